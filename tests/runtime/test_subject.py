"""Models by name: as a module's callable, as a file's, as a checkpoint."""

import sys

import pytest
import torch
import torch.nn.functional as F

from lotion_fx.subject import is_reference, subject, transformed

HERE = "tests.runtime.subjects"


def test_a_loss_is_that_of_the_model_called_by_hand():
    found = subject(f"{HERE}:classifier")
    inputs, targets = found.batch
    assert torch.equal(found.loss(), F.cross_entropy(found.model(inputs), targets))
    own = subject(f"{HERE}:with_its_loss")
    assert torch.equal(own.loss(), own.model(**own.batch)) and own.loss_fn is None


def test_each_call_makes_it_anew():
    assert subject(f"{HERE}:alone").model is not subject(f"{HERE}:alone").model


def test_a_file_is_imported_once_and_finds_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour.py").write_text("width = 8\n")
    file = tmp_path / "made.py"
    file.write_text("import neighbour\nfrom torch import nn\nclass Own(nn.Linear): ...\n"
                    "def small(): return Own(neighbour.width, 2)\n")  # fmt: skip
    first, second = (subject(f"{file}:small").model for _ in range(2))
    assert first.weight.shape == (2, 8) and type(first) is type(second)
    assert sys.modules[type(first).__module__].Own is type(first)


def test_a_module_is_found_where_the_command_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_the_user.py").write_text("from torch import nn\ndef small(): return nn.Linear(8, 2)\n")
    assert subject("of_the_user:small").model.weight.shape == (2, 8)


def test_a_checkpoint_s_tokens_are_its_labels(tmp_path):
    from lotion_fx.examples import tiny

    tiny.llama().save_pretrained(tmp_path)
    found = subject(str(tmp_path))
    assert torch.equal(found.loss(), found.model(**found.batch).loss)
    assert torch.equal(found.batch["input_ids"], found.batch["labels"])


def test_a_path_is_no_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_reference("a.b:c") and is_reference("a/b.py:c") and not is_reference("a/b")
    (tmp_path / "a:b").mkdir()
    assert not is_reference("a:b")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "no Hugging Face checkpoint is there; give its folder, or package.module:callable"),
        ("no_such_module:model", "no_such_module cannot be imported from"),
        (f"{HERE}:no_such", "tests.runtime.subjects has no callable 'no_such'"),
        (f"{HERE}:text", "has no callable 'text'"),
        (f"{HERE}:number", "it returned int; expected a model, "),
        ("no_such.py:model", "there is no file no_such.py"),
    ],
)
def test_what_names_nothing_is_said_in_a_sentence(source, message):
    with pytest.raises(ValueError) as caught:
        subject(source)
    assert str(caught.value).startswith(f"source={source!r}: ") and message in str(caught.value)


def test_a_callable_with_arguments_is_refused(tmp_path):
    path = tmp_path / "made.py"
    path.write_text("from torch import nn\ndef small(width): return nn.Linear(width, 2)\n")
    with pytest.raises(TypeError, match=r"source=.*made.py:small': expected a callable without arguments, missing"):
        subject(f"{path}:small")


def test_a_model_is_transformed_once():
    assert transformed(f"{HERE}:alone", "int4", "linear").model is not None
    with pytest.raises(ValueError, match="is transformed already; leave them out"):
        transformed(f"{HERE}:transformed", "int4", None)
    with pytest.raises(ValueError, match="it needs a format, such as int4 or nvfp4/pow2"):
        transformed(f"{HERE}:alone", None, None)
    with pytest.raises(ValueError, match="it gives a model alone"):
        transformed(f"{HERE}:alone", "int4", None).loss()
