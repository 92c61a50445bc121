"""The commands that make a set or a teacher, and judge a set: distill, train and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddkit.cli.common import (
    IPC,
    PAIRS,
    PIPC,
    Names,
    Place,
    echo_json,
    options,
    protocol,
    quiet,
    refuse_given,
    set_verbosity,
    shared,
    show,
    verbose,
)
from ddkit.components.figures import budget, evaluation_table, percent
from ddkit.errors import FlagError
from ddkit.text import counted

recipe_flags = options(
    click.option(
        "--recipe",
        type=Names("recipe", files=".toml"),
        metavar="NAME|FILE",
        help="Recipe to start from (default: the recipe named default).",
    ),
    click.option(
        "--losses",
        type=Names("loss", "loss-group", many=True),
        metavar="NAMES",
        help="Losses, e.g. dm,dkkt, or with weights: dm:200,dkkt-primal:1.",
    ),
    click.option("--ipc", type=IPC, help="Synthetic images per class. 10,tail=3 gives the class tail 3 and all others 10."),
    click.option("--pipc", type=PIPC, help="Real images per class that the run may use, or all."),
    click.option("--steps", type=click.IntRange(min=0), help="Number of updates of the synthetic set."),
    click.option("--teacher", metavar="FILE|auto", help="File of a trained model. auto trains one on all training images and caches it."),
    click.option(
        "--model",
        type=Names("model"),
        metavar="NAME",
        help="Architecture of the teacher, of the matched network and of the networks in the evaluation.",
    ),
    click.option("--init", type=Names("initializer"), metavar="NAME", help="Initializer of the synthetic images: real, noise, ..."),
    click.option(
        "--augment", type=Names("augmenter"), metavar="NAME", help="Augmenter shared by real and synthetic images: dsa, none, ..."
    ),
    click.option(
        "--evaluate",
        "evaluators",
        type=Names("evaluator", many=True),
        metavar="NAMES|none",
        help="Evaluators, separated by commas, or none.",
    ),
    protocol,
    click.option(
        "--deterministic",
        is_flag=True,
        default=None,
        help="Make every run give the same bytes. Components that cannot do so on a GPU are refused.",
    ),
)


@click.command()
@recipe_flags
@shared
@click.option("--out", metavar="DIR", type=Place(), help="New or empty run directory.")
@click.option("--force", is_flag=True, help="Replace the run in --out, after all checks of the new run have passed.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out. --steps and --device may change. --dataset and --teacher give new paths if files were moved.",
)
@click.option("--plan", is_flag=True, help="Show the resolved recipe and the estimated cost. Nothing is trained or written.")
@quiet
@verbose
def distill(resume: bool, plan: bool, as_json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Make a synthetic training set.

    Without flags it makes 1 image per class of the digits that are included with ddkit, in a minute.
    """
    set_verbosity(quiet, verbose)
    _check_modes(resume, plan, flags)
    from ddkit import api
    from ddkit.cli.progress import watching

    if plan:
        del flags["force"]
        planned = api.plan(flags.pop("recipe"), distributed=True, **flags)
        echo_json(planned) if as_json else _show_plan(planned)
        return
    with watching(quiet, verbose) as observers:
        if resume:
            kept = {name: flags[name] for name in ("dataset", "teacher", "steps", "device", "allow_code")}
            run = api.resume(flags["out"], observers=observers, distributed=True, **kept)
        else:
            run = api.distill(observers=observers, distributed=True, **flags)
    _show_run(run, as_json)


WITH_RESUME = ("dataset", "teacher", "steps", "device", "out", "allow_code", "force")  # beside --resume; --force was refused above


def _check_modes(resume: bool, plan: bool, flags: dict[str, Any]) -> None:
    """Raises FlagError for flags that cannot go together with --force, --resume or --plan."""
    for given, name, why in ((resume, "resume", "continues the run that is there"), (plan, "plan", "writes nothing")):
        if flags["force"] and given:
            raise FlagError(f"--force replaces the run in --out, but --{name} {why}. Leave one of them out.")
    if flags["force"] and flags["out"] is None:
        raise FlagError("--force replaces the run in --out, so --out is needed, for example --out runs/dm-digits-1 --force.")
    if not resume:
        return
    given_flags = [name for name, value in flags.items() if value not in (None, {}) and name not in WITH_RESUME]
    if given_flags:
        names = {"sets": "set", "evaluators": "evaluate"}
        told = ", ".join(f"--{names.get(name, name).replace('_', '-')}" for name in given_flags)
        raise FlagError(
            f"--resume continues with the run's own recipe, which {told} cannot change. Leave it out, or start a new run without --resume."
        )
    if plan:
        raise FlagError("--resume continues a run, but --plan is for a new run. Leave one of them out.")
    if flags["out"] is None:
        raise FlagError("--resume continues the run in --out, so --out is needed, for example --out runs/dm-digits-1 --resume.")


def _show_plan(plan: dict[str, Any]) -> None:
    import tomli_w

    show(tomli_w.dumps(plan["recipe"]))
    in_processes = f" in {plan['processes']} processes" if plan["processes"] > 1 else ""
    height_width = " x ".join(str(side) for side in plan["image_shape"][1:])
    found, cost = plan["teacher_accuracy"], plan["estimate"]
    known = "" if found is None else f" (right on {100 * found['accuracy']:.1f} % of {found['images']} accessible images)"
    experts = f" Experts: {plan['experts']}{', which are trained first and kept' if plan['experts_are_trained_first'] else ''}."
    waits = ", which is trained first and kept for the next time" if plan["teacher_is_trained_first"] else ""
    makes = plan["parametrization"]
    each = makes["images_per_class"]
    made = counted(each, "image") if isinstance(each, int) else f"{min(each.values())} to {max(each.values())} images"
    far = f", {makes['encoding_error']:.3f} from those of the initializer (root mean square, normalised units)"
    show(
        f"Would distil {plan['synthetic_images']} images of {plan['image_shape'][0]} x {height_width} (channels x height x width), "
        f"{len(plan['classes'])} classes, from {plan['accessible_images']} real ones in {plan['recipe']['steps']} steps on "
        f"{plan['device']}{in_processes}. Teacher: {plan['teacher'] or 'none needed'}{known}{waits}.{experts if plan['experts'] else ''}"
    )
    show(
        f"Stored per class: {budget(makes['stored_numbers'], makes['stored_as_images'])}, of which parametrization {makes['use']} makes "
        f"{made}{far if makes['encoding_error'] else ''}."
    )
    if plan["training"]:
        show(plan["training"])
    minutes = cost["seconds"] / 60
    about = "a minute or less" if minutes < 1.5 else f"about {minutes:.0f} minutes" if minutes < 120 else f"about {minutes / 60:.0f} hours"
    show(
        f"It takes {about} and {cost['memory_mib'] / 1024:.1f} GiB of memory here: "
        f"{sum(cost['operations'].values()):.1e} operations, and this machine multiplies matrices at "
        f"{cost['operations_per_second'] / 1e9:,.0f} GFLOP/s now."
    )


def _show_run(run: Any, as_json: bool) -> None:
    if as_json:
        import msgspec

        facts = {"run": str(run.path), "steps": run.steps, "seconds": round(run.seconds, 3), "shares": run.shares}
        echo_json(facts | {"evaluations": msgspec.to_builtins(run.evaluations)})
        return
    if run.evaluations:
        show(evaluation_table(run.evaluations))
        show("")
    from ddkit.run.doubts import words

    own = run.shares
    gradient = f"\ngradient {words(own)} (share of each loss, median of the logged steps)" if own else ""
    show(f"{run.steps} steps in {run.seconds:.1f} s{gradient}\nrun      {run.path}\npicture  {run.path / 'preview.png'}")
    if (run.path / "report.html").is_file():
        show(f"report   {run.path / 'report.html'}")


@click.command()
@shared
@click.option("--model", type=Names("model"), metavar="NAME", help="Architecture of the teacher or experts: convnet, mlp, ...")
@click.option(
    "--recipe",
    type=Names("recipe", files=".toml"),
    metavar="NAME|FILE",
    help="Recipe whose [teacher] and [train] tables are used (default: the recipe named default).",
)
@click.option(
    "--out", required=True, metavar="FILE|DIR", type=Place(), help="New teacher file, .safetensors. With --experts: folder of the experts."
)
@click.option(
    "--experts", type=click.IntRange(min=1), help="Train this number of experts: networks of the table [network], saved after epochs."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs that each expert is trained (default: 10).")
@click.option("--save-every", type=click.IntRange(min=1), help="Save an expert's weights after every so many epochs (default: 1).")
@click.option("--pipc", type=PIPC, help="Real images per class that experts are trained on, or all.")
@quiet
@verbose
def train(as_json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Train a teacher on all training images and save it. With --experts, train experts on the accessible images into a folder.

    A teacher's settings are the recipe's tables [teacher] and [train]: --set teacher.norm=batch --set train.epochs=8. Those of experts are
    [network], [experts] and [train]. If the training of experts was interrupted, the same command continues it.
    """
    set_verbosity(quiet, verbose)
    from ddkit import api
    from ddkit.cli.progress import watching

    if flags["experts"] is not None:
        with watching(quiet, verbose) as observers:
            experts = api.train_experts(observers=observers, **flags)
        facts = {"experts": experts.count, "epochs": list(experts.epochs), "accuracy": experts.accuracy}
        if as_json:
            echo_json({"folder": str(flags["out"]), **facts})
        else:
            show(f"experts  {flags['out']}\ntraining accuracy  {percent(experts.accuracy[-1], None)} after epoch {experts.epochs[-1]}")
        return
    refuse_given(("epochs", "save_every", "pipc"), "only --experts uses it.")
    for name in ("experts", "epochs", "save_every", "pipc"):
        del flags[name]
    with watching(quiet, verbose) as observers:
        teacher = api.train(observers=observers, **flags)
    found = teacher.info["test_accuracy"]
    if as_json:
        echo_json({"teacher": str(flags["out"]), "test_accuracy": found, "model": teacher.info["model"]})
    else:
        show(f"teacher  {flags['out']}\ntest accuracy  {percent(found, None)}")


@click.command()
@click.argument("target", metavar="RUN|FILE", type=click.Path())
@shared
@click.option(
    "--evaluate",
    "evaluators",
    type=Names("evaluator", many=True),
    metavar="NAMES",
    help="Evaluators, separated by commas (default: the evaluators of the run, or else accuracy).",
)
@click.option("--model", type=Names("model", many=True), metavar="NAMES", help="Architectures to train on the set, separated by commas.")
@protocol
@click.option("--repeats", type=click.IntRange(min=1), help="Number of networks to train (default: the number in the protocol).")
@click.option("--teacher", metavar="FILE", help="File of a trained model, for evaluators that use one.")
@click.option("--pipc", type=PIPC, help="Real images per class for the random-real baseline (default: as in the run).")
@click.option(
    "--match-classes", type=PAIRS, metavar="A=B,...", help="Classes of the set with their names in the data: cat=tabby,dog=beagle."
)
@quiet
@verbose
def evaluate(target: str, as_json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Evaluate the synthetic set of a run directory or file: train networks on it, and test them on real images."""
    set_verbosity(quiet, verbose)
    from ddkit import api
    from ddkit.cli.progress import watching

    with watching(quiet, verbose) as observers:
        rows = api.evaluate(target, observers=observers, distributed=True, **flags)
    if not as_json:
        show(evaluation_table(rows))
        return
    import msgspec

    from ddkit.run.manifest import read_manifest

    manifest = read_manifest(Path(target)) if Path(target).is_dir() else {}  # a file alone does not say how it was made
    made_in = {key: manifest.get(key) for key in ("steps", "seconds")}
    echo_json({"run": target, **made_in, "evaluations": msgspec.to_builtins(rows)})
