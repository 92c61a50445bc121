"""The commands that make something: distill and train."""

from __future__ import annotations

from typing import Any

import click

from ddkit.cli.common import (
    Pipc,
    Place,
    blaming_flags,
    echo_json,
    evaluation_table,
    options,
    percent,
    protocol,
    quiet,
    set_verbosity,
    shared,
    show,
    verbose,
)
from ddkit.cli.names import Names
from ddkit.errors import FlagError

FLAG_PATHS = {
    "dataset": "data__use",
    "data_dir": "data__dir",
    "teacher": "teacher__use",
    "init": "initializer__use",
    "augment": "augmenter__use",
    "ipc": "ipc",
    "pipc": "pipc",
    "steps": "steps",
    "seed": "seed",
    "deterministic": "engine__deterministic",
}

recipe_flags = options(
    click.option("--recipe", type=Names("recipe", files=".toml"), metavar="NAME|FILE", help="Recipe to start from (default: default)."),
    click.option(
        "--losses",
        type=Names("loss", "loss-group", many=True),
        metavar="NAMES",
        help="Losses, with weights if you like: dm,dkkt or dm:200,dkkt-primal:1.",
    ),
    click.option("--ipc", type=click.IntRange(min=1), help="Synthetic images per class."),
    click.option("--pipc", type=Pipc(), help="Real images per class that may be used, or all."),
    click.option("--steps", type=click.IntRange(min=0), help="Updates of the synthetic set."),
    click.option("--teacher", metavar="FILE|auto", help="Trained model; auto trains one on all training images and caches it."),
    click.option(
        "--model", type=Names("model"), metavar="NAME", help="Architecture of the teacher, the matched network and the evaluation."
    ),
    click.option("--init", type=Names("initializer"), metavar="NAME", help="Initializer: real, noise, ..."),
    click.option(
        "--augment", type=Names("augmenter"), metavar="NAME", help="Augmenter shared by real and synthetic images: dsa, none, ..."
    ),
    click.option("--evaluate", type=Names("evaluator", many=True), metavar="NAMES|none", help="Evaluators, or none."),
    protocol,
    click.option(
        "--deterministic",
        is_flag=True,
        default=None,
        help="The same bytes again: refuse what a GPU adds up in another order each time.",
    ),
)


@click.command()
@recipe_flags
@shared
@click.option("--out", metavar="DIR", type=Place(), help="Run directory, absent or empty.")
@click.option("--force", is_flag=True, help="Replace the run that is in --out, once all checks of the new one have passed.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out; --steps and --device may change, --dataset and --teacher tell where both were moved.",
)
@click.option("--plan", is_flag=True, help="Show what would be done; train and write nothing.")
@quiet
@verbose
def distill(**flags: Any) -> None:
    """Make a synthetic training set.

    Without flags: 1 image per class of the digits that come along, in a minute.
    """
    set_verbosity(flags["quiet"], flags["verbose"])
    _check_force(flags)
    if flags["resume"]:
        _show_run(_resumed(flags), flags["as_json"])
        return
    recipe = _recipe(flags)
    from ddkit import api
    from ddkit.cli.progress import watching

    if flags["plan"]:
        from ddkit.run.directory import check_claimable

        with blaming_flags(flags):
            if flags["out"] is not None:
                check_claimable(flags["out"], force=False)
            _show_plan(api.plan(recipe, device=flags["device"], distributed=True), flags["as_json"])
        return
    with blaming_flags(flags), watching(flags["quiet"], flags["verbose"]) as observers:
        run = api.run_recipe(
            recipe,
            losses=flags["losses"],
            device=flags["device"],
            out=flags["out"],
            observers=observers,
            distributed=True,
            force=flags["force"],
        )
    _show_run(run, flags["as_json"])


def _check_force(flags: dict[str, Any]) -> None:
    """Raises FlagError if --force has no run to replace."""
    for name, why in (("resume", "continues the run that is there"), ("plan", "writes nothing")):
        if flags["force"] and flags[name]:
            raise FlagError(f"--force replaces the run in --out, and --{name} {why}. Leave one of them out.")
    if flags["force"] and flags["out"] is None:
        raise FlagError("--force replaces the run in --out: name it, for example --out runs/dm-digits-1 --force.")


def _recipe(flags: dict[str, Any]) -> Any:
    from ddkit.recipes.resolve import parse_set, recipe_for

    paths = {path: flags[name] for name, path in FLAG_PATHS.items()}
    with blaming_flags(flags):
        return recipe_for(
            flags["recipe"], losses=flags["losses"], evaluators=flags["evaluate"], protocol=flags["protocol"], model=flags["model"],
            sets=[parse_set(text) for text in flags["sets"]], **paths,
        )  # fmt: skip


def _resumed(flags: dict[str, Any]) -> Any:
    own = {*FLAG_PATHS, "recipe", "losses", "model", "evaluate", "protocol"} - {"steps", "dataset", "teacher"}
    given = [name for name in flags if name in own and flags[name] is not None]
    if given or flags["sets"]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given or ["set"])
        raise FlagError(f"--resume takes the run's own recipe; {names} cannot change it. Start a new run, or leave it out.")
    if flags["plan"]:
        raise FlagError("--resume continues a run at once; --plan goes with a new one. Leave one of them out.")
    if flags["out"] is None:
        raise FlagError("--resume continues the run in --out: name it, for example --out runs/dm-digits-1 --resume.")
    from ddkit import api
    from ddkit.cli.progress import watching

    with watching(flags["quiet"], flags["verbose"]) as observers:
        return api.resume(
            flags["out"], dataset=flags["dataset"], teacher=flags["teacher"], steps=flags["steps"], device=flags["device"],
            observers=observers, distributed=True,
        )  # fmt: skip


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json(plan)
        return
    import tomli_w

    show(tomli_w.dumps(plan["recipe"]))
    in_processes = f" in {plan['processes']} processes" if plan["processes"] > 1 else ""
    height_width = " x ".join(str(side) for side in plan["image_shape"][1:])
    show(
        f"Would distil {plan['synthetic_images']} images of {plan['image_shape'][0]} x {height_width} (channels x height x width), "
        f"{len(plan['classes'])} classes, from {plan['accessible_images']} real ones in {plan['recipe']['steps']} steps on "
        f"{plan['device']}{in_processes}; teacher: {_teacher_of(plan)}."
    )
    cost = plan["estimate"]
    show(
        f"It takes {_about(cost['seconds'])} and {cost['memory_mib'] / 1024:.1f} GiB of memory here: "
        f"{sum(cost['operations'].values()):.1e} operations, and this machine multiplies matrices at "
        f"{cost['operations_per_second'] / 1e9:,.0f} GFLOP/s now."
    )


def _teacher_of(plan: dict[str, Any]) -> str:
    """Returns which teacher a plan has, whether it is trained first, and how good it is."""
    found = plan.get("teacher_accuracy")
    known = "" if found is None else f" (right on {100 * found['accuracy']:.1f} % of {found['images']} accessible images)"
    waits = ", which is trained first and kept for the next time" if plan.get("teacher_is_trained_first") else ""
    return f"{plan['teacher'] or 'none needed'}{known}{waits}"


def _about(seconds: float) -> str:
    """Returns a time as people say it.

    >>> _about(20), _about(100), _about(90000)
    ('a minute or less', 'about 2 minutes', 'about 25 hours')
    """
    if seconds < 90:
        return "a minute or less"
    return f"about {seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"about {seconds / 3600:.0f} hours"


def _show_run(run: Any, as_json: bool) -> None:
    if as_json:
        import msgspec

        rows = msgspec.to_builtins(run.evaluations)
        echo_json(
            {
                "schema": 1,
                "run": str(run.path),
                "steps": run.steps,
                "seconds": round(run.seconds, 3),
                "shares": run.shares,
                "evaluations": rows,
            }
        )
        return
    if run.evaluations:
        show(evaluation_table(run.evaluations))
        show("")
    from ddkit.run.shares import words

    own = run.shares
    gradient = f"\ngradient {words(own)} (share of each loss, median of the logged steps)" if own else ""
    show(f"{run.steps} steps in {run.seconds:.1f} s{gradient}\nrun      {run.path}\npicture  {run.path / 'preview.png'}")
    if (run.path / "report.html").is_file():
        show(f"report   {run.path / 'report.html'}")


@click.command()
@shared
@click.option("--model", type=Names("model"), metavar="NAME", help="Architecture: convnet, mlp, ...")
@click.option(
    "--recipe",
    type=Names("recipe", files=".toml"),
    metavar="NAME|FILE",
    help="Recipe whose [teacher] and [train] tables are used (default: default).",
)
@click.option("--out", required=True, metavar="FILE", type=Place(), help="Teacher file to write, .safetensors.")
@quiet
@verbose
def train(**flags: Any) -> None:
    """Train a teacher on all training images and save it.

    Settings are the recipe's [teacher] and [train] tables: --set teacher.norm=batch --set train.epochs=8
    """
    set_verbosity(flags["quiet"], flags["verbose"])
    from ddkit.recipes.resolve import parse_set

    sets = [parse_set(text) for text in flags["sets"]]
    from ddkit import api
    from ddkit.cli.progress import watching

    with watching(flags["quiet"], flags["verbose"]) as observers:
        teacher = api.train(
            flags["out"], dataset=flags["dataset"], model=flags["model"], data_dir=flags["data_dir"], seed=flags["seed"],
            recipe=flags["recipe"], sets=dict(sets), device=flags["device"], observers=observers,
        )  # fmt: skip
    found = teacher.info["test_accuracy"]
    if flags["as_json"]:
        echo_json({"schema": 1, "teacher": str(flags["out"]), "test_accuracy": found, "model": teacher.info["model"]})
    else:
        show(f"teacher  {flags['out']}\ntest accuracy  {percent(found, None)}")


COMMANDS = (distill, train)
