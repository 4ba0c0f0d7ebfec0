"""trompe: can this model's explanations be trusted? The public names, nothing else."""

from trompe.catalog import build, names
from trompe.classifier import Classifier, ModelCard, ModelSpec, load_model, save_model
from trompe.clean_models import HonestTraining, train_clean_model
from trompe.evaluate import Remembered, answers
from trompe.experiment import (
    AttackJob,
    Experiment,
    read_experiment,
    remeasure,
    run,
    run_folder,
    shipped_experiment,
)
from trompe.explaining import explain
from trompe.interfaces import (
    Attacked,
    Batch,
    Evidence,
    Goal,
    ImageSet,
    InputError,
    Pass,
    PoisonSet,
    TableSet,
    Target,
    TrompeError,
)
from trompe.many import Crew, Job, Outcome, Place, crew_of, run_jobs
from trompe.measure_victims import victims_of
from trompe.poisoning import (
    PoisoningExperiment,
    Victims,
    poison,
    poison_sets,
    read_poisoning,
)
from trompe.recording import watch
from trompe.report import draw_gallery, render
from trompe.run_list import list_runs
from trompe.runs import RunFolder
from trompe.search import SearchFolder, read_search, search
from trompe.train import Training, fit

__all__ = [
    "AttackJob",
    "Attacked",
    "Batch",
    "Classifier",
    "Crew",
    "Evidence",
    "Experiment",
    "Goal",
    "HonestTraining",
    "ImageSet",
    "InputError",
    "Job",
    "ModelCard",
    "ModelSpec",
    "Outcome",
    "Pass",
    "Place",
    "PoisonSet",
    "PoisoningExperiment",
    "Remembered",
    "RunFolder",
    "SearchFolder",
    "TableSet",
    "Target",
    "Training",
    "TrompeError",
    "Victims",
    "answers",
    "build",
    "crew_of",
    "draw_gallery",
    "explain",
    "fit",
    "list_runs",
    "load_model",
    "names",
    "poison",
    "poison_sets",
    "read_experiment",
    "read_poisoning",
    "read_search",
    "remeasure",
    "render",
    "run",
    "run_folder",
    "run_jobs",
    "save_model",
    "search",
    "shipped_experiment",
    "train_clean_model",
    "victims_of",
    "watch",
]
