"""The refusals of a study before its first set is made: recipes, protocols, teachers and data that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ddkit.components import registry
from ddkit.data.held_out import check_held_out
from ddkit.data.real import open_dataset
from ddkit.engine.losses import losses_of
from ddkit.errors import DdkitError, InputError
from ddkit.nn.teacher import read_teacher
from ddkit.recipes.resolve import check_options, resolve
from ddkit.recipes.settings import flattened
from ddkit.recipes.tables import Recipe
from ddkit.studies.grid import REAL_IMAGES, Settings, Task
from ddkit.studies.study import Study
from ddkit.text import counted


def check_study(study: Study, tasks: Sequence[Task], settings: Settings) -> None:
    """Raises a DdkitError where a set could not be made or evaluated, as far as that is seen before the first is made.

    It says which key of the study is at fault, where it is no flag.
    """
    for protocol, system in {task.evaluation.protocol: task.cell.system for task in reversed(tasks)}.items():
        table = study.systems.get(system)  # None: a blend's, which has the study's protocol
        key = f"systems.{system}.protocol" if table and table.protocol else "protocol"
        own = [] if settings.protocol else [("evaluators.accuracy.protocol", protocol)]
        with _told_of("" if settings.protocol else key):
            resolve(REAL_IMAGES, evaluators="accuracy", evaluation={"protocol": settings.protocol}, sets=own)
    for task in (task for task in tasks if task.seed == 0 and not task.parts):  # other seeds have the same recipes
        with _told_of(f"systems.{task.cell.system}"):
            check_options(task.recipe)
        _check_images(study, task)
        if task.evaluation.labels == "stored" and task.recipe.own_labels.kind == "hard":
            raise InputError(
                f'systems.{task.cell.system}: labels = "stored", of the system or its protocol, are those of a set, but its recipe stores '
                'none (labels.kind = "hard"). Use labels = "hard" or "soft" for this system.',
                f"systems.{task.cell.system}.labels",
            )
    for teacher, system in {task.recipe.teacher.use: task.cell.system for task in reversed(tasks) if not task.parts}.items():
        if teacher != "auto":
            with _told_of(_origin(study, system, settings)):
                read_teacher(Path(teacher))


def check_data(study: Study, recipes: Sequence[Recipe]) -> None:
    """Raises InputError if the data of a set cannot be opened, or has too few images for those that are held out."""
    for data in {msgspec.json.encode(recipe.data): recipe.data for recipe in recipes}.values():
        dataset = open_dataset(data)
        for pipc in {recipe.pipc for recipe in recipes if recipe.data == data and study.held_out}:
            remedy = "Lower `held_out` or the `pipc` of the cells in the study, or use a dataset with more images: --dataset NAME."
            check_held_out(dataset, pipc, study.held_out, remedy=remedy)


def _origin(study: Study, system: str, settings: Settings) -> str:
    """Returns the key of the study that decides the teacher of a system, "" for a flag."""
    paths = {"teacher", "teacher.use"}
    if settings.teacher or paths & dict(flattened(dict(settings.sets))).keys():
        return ""
    own = paths & dict(flattened(study.systems[system].set)).keys()
    return "set" if not own and paths & dict(flattened(study.set)).keys() else f"systems.{system}"


@contextmanager
def _told_of(key: str) -> Iterator[None]:
    """Inside, a DdkitError says which `key` of the study it is about, "" for none."""
    try:
        yield
    except DdkitError as error:
        error.args = (f"{key}: {error}" if key else str(error),)
        raise


def _check_images(study: Study, task: Task) -> None:
    """Raises InputError where the cell has too few real images for the losses or the first images of the system."""
    recipe, table = task.recipe, task.recipe.initializer
    if recipe.pipc == "all":
        return
    baseline = study.systems[task.cell.system].baseline
    makes = registry.create("parametrization", recipe.parametrization.use, recipe.parametrization.options, where="parametrization")
    initializer = registry.create("initializer", table.use, table.options, where="initializer")
    count = initializer.needed(makes.images_per_class(task.cell.ipc))
    count = min(count, 1) if table.reuse else count
    who, changes = (f"baseline {baseline}", "`pipc`") if baseline else (f"initializer {table.use}", "`pipc` or initializer")
    needing = [] if recipe.pipc or baseline else [each.label for each in losses_of(recipe) if each.requires.real]
    if needing:
        who, count = f"loss {needing[0]}", 1
    if count > recipe.pipc:
        where = f"systems.{task.cell.system}, cell {task.cell.ipc}:{task.cell.pipc}"
        raise InputError(
            f"{where}: the {who} needs {counted(count, 'real image')} per class, but the system has {recipe.pipc}. "
            f"Leave it out of this cell (`systems` of the cell, --systems or --cells), or change its {changes} in the study.",
            f"systems.{task.cell.system}",
        )
