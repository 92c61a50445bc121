"""A state dict of another project becomes a file of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ddkit.components import registry, trust
from ddkit.components.base import DataInfo
from ddkit.components.options import written_options
from ddkit.errors import FlagError, InputError, RunFilesError, refuse_unused
from ddkit.files import check_out, sha256
from ddkit.nn.networks import build_network
from ddkit.nn.teacher import Teacher, check_outputs, load_state, save_teacher
from ddkit.recipes.resolve import resolve
from ddkit.run.declared import WHITENED, Declared, class_names_of, statistics_of, whitening_of
from ddkit.run.foreign import fitted, plain


def import_teacher(path: Path, state: Mapping[str, Tensor], out: Path, declared: Declared) -> Teacher:
    settings, size = declared.settings, declared.size
    own = ("teacher.use", "teacher.mean", "teacher.std", "teacher.classes", "teacher.check")
    unused = declared.given("pixels", "labels", "ipc", "index", "grid", "step_size")
    unused += [f"--set {each}" for each in settings if not each.startswith("teacher.") or each in own]
    refuse_unused(unused, f"{path} is a teacher, for which --set takes options of the model only, for example teacher.norm=batch.")
    refuse_unused(["--not-whitened"] if declared.whitened is False else [], f"{path} is a teacher.")
    if declared.whitened:
        refuse_unused(declared.given("mean", "std"), WHITENED)
    norm = whitening_of(declared)[0] if declared.whitened else statistics_of(path, declared.mean, declared.std)
    check_out(out)
    if out.exists():
        raise RunFilesError(f"--out {out} exists already. Name a new file.")
    if declared.classes is None or size is None:
        raise InputError(
            f"{path} is a state dict, which records neither classes nor image size. Add --classes 10, or the class names, and --size 32 "
            "(or height,width)."
        )
    if len(size) != 2 or min(size) < 1:
        raise FlagError(f"--size must be height and width in pixels, both at least 1, not {list(size)}.")
    names = class_names_of(declared.classes, 2, path)
    check_outputs(path, names, state)
    info = DataInfo(class_names=tuple(names), channels=len(norm.mean), size=(int(size[0]), int(size[1])))
    if norm.whitening is not None and tuple(norm.whitening.centre.shape) != info.shape:
        raise FlagError(f"--size: the images of --dataset have the shape {tuple(norm.whitening.centre.shape)} (C, H, W), not {info.shape}.")
    table = resolve({"name": "import"}, model=declared.model, sets=settings).teacher
    with trust.granting({"model": declared.model}, settings):
        factory = registry.create("model", table.model, table.options, data=info, where="teacher")
    module = build_network(factory, info, 0, "teacher")
    built = module.state_dict()
    tensors = {name: plain(value, name, path) for name, value in fitted(state, built).items()}
    load_state(
        module, {name: value.to(built[name].dtype) if name in built else value for name, value in tensors.items()}, path, table.model
    )
    kept = {key: value for key, value in written_options(factory.options).items() if not key.startswith("weights")}  # these are newer
    record = {
        "model": registry.split_name(table.model)[0], "options": kept,
        "mean": list(norm.mean), "std": list(norm.std),
        "class_names": list(info.class_names), "input_shape": list(info.shape), "test_accuracy": None,
        "imported": {"path": str(path.absolute()), "sha256": sha256(path)},
    }  # fmt: skip
    teacher = Teacher(module, mean=norm.mean, std=norm.std, whitening=norm.whitening, info=record, path=str(out))
    save_teacher(out, teacher)
    return teacher
