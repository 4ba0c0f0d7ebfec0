"""A network in two parts: up to a layer, and behind it."""

from typing import Any

from torch import fx, nn

from trompe.interfaces import InputError


class _Tracer(fx.Tracer):
    """Goes into the modules that contain the layer only, so that all others keep their names."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not f"{self.layer}.".startswith(f"{module_qualified_name}.") or (
            module_qualified_name == self.layer
        )


def split(network: nn.Module, layer: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(body, tail): tail(body(inputs)) = network(inputs); body ends with `layer`'s output.

    Both use the network's own modules and parameters, under their own names. Raises InputError for
    a layer that is not run exactly once, a forward() around it that cannot be traced, or where
    something passes the layer by.
    """
    if layer not in dict(network.named_modules()) or not layer:
        raise InputError(f"layer {layer!r}: {type(network).__name__} has no such module")
    try:
        graph = _Tracer(layer).trace(network)
    except Exception as error:  # tracing runs the model's own code, which can fail in any way
        raise InputError(
            f"model {type(network).__name__}: the way to layer {layer!r} cannot be traced "
            f"({type(error).__name__}: {error}); the forward() of the modules around it must not "
            "depend on values or sizes"
        ) from error
    runs = [n for n in graph.nodes if n.op == "call_module" and n.target == layer]
    if len(runs) != 1:
        raise InputError(
            f"layer {layer!r}: {type(network).__name__} runs it {len(runs)} times; name one that "
            "it runs once"
        )
    (cut,) = runs
    body, tail = fx.Graph(), fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = body.node_copy(node, lambda n: made[n])
        if node is cut:
            body.output(made[node])
            break
    behind = {cut: tail.placeholder("features")}

    def known(node: fx.Node) -> fx.Node:
        if node in behind:
            return behind[node]
        if node.op == "get_attr":
            behind[node] = tail.node_copy(node)
            return behind[node]
        raise InputError(
            f"layer {layer!r}: something passes it by in {type(network).__name__} ({node.name}); "
            "name a layer through which all goes"
        )

    seen = False
    for node in graph.nodes:
        if seen:
            behind[node] = tail.node_copy(node, known)
        seen = seen or node is cut
    names: Any = type(network).__name__
    return (
        fx.GraphModule(network, body, f"{names}Body"),
        fx.GraphModule(network, tail, f"{names}Tail"),
    )
