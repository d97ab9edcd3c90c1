"""QLoRA: four bits where they should be, the numbers of the dequantised dense model, and what is refused."""

import importlib
import importlib.util
import json

import pytest
import torch

from tests.conftest import picture
from tests.model.test_exactness import assert_checkpointing_changes_nothing, assert_equal, fast, gradients, lessons_of
from tests.model.test_exactness import examples as examples
from tests.training.test_train import _stop_behind, adapter_of, assert_same, config
from vlm_lora.cli import main
from vlm_lora.config import LORA, TrainConfig
from vlm_lora.errors import AdapterError, ModelError
from vlm_lora.inference import captioner
from vlm_lora.inference.captioner import Captioner, Decoding
from vlm_lora.inference.evaluate import evaluate
from vlm_lora.inference.verdict import summary
from vlm_lora.model.adapters.methods import attach_adapter, load_adapter
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.features import FeatureCache
from vlm_lora.training import step
from vlm_lora.training.batches import Loader
from vlm_lora.training.processes import Processes
from vlm_lora.training.run import train_adapter as train
from vlm_lora.training.step import mean_loss

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def shaken(backbone, variant: str, method: str = "qlora"):
    more = {"variant": variant, "rank": 4} if method in LORA else {}
    settings = TrainConfig(data="none", method=method, **more)
    adapter = attach_adapter(backbone, settings)
    for i, (_, parameter) in enumerate(adapter.named_parameters()):
        torch.manual_seed(i)
        parameter.data += torch.randn_like(parameter.data) * 0.1
    return adapter


def opened(quantised):
    """The dense base with the values that the four bits of the other stand for."""
    from bitsandbytes.functional import dequantize_4bit

    dense = load_backbone(quantised.name, dtype="float32")
    for name, parameter in quantised.model.named_parameters():
        if getattr(parameter, "quant_state", None):
            weight = dense.model.get_parameter(name.replace(".base_layer", ""))
            values = dequantize_4bit(parameter.data, parameter.quant_state)
            assert (values - weight).abs().max() > 1e-3  # NF4 is not nothing
            weight.data = values
    return dense


def without_bitsandbytes(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    )


def test_without_bitsandbytes_it_is_said_in_one_line(checkpoints, monkeypatch):
    without_bitsandbytes(monkeypatch)
    with pytest.raises(ModelError, match=r"need bitsandbytes.*pip install") as caught:
        load_backbone(str(checkpoints["qwen2_vl"]), quantise=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="need bitsandbytes"):  # before the data is looked for
        train(TrainConfig(data="nowhere", method="qlora"))


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_5"])
def test_the_language_linears_are_in_four_bits_and_nothing_else(checkpoints, family):
    from bitsandbytes.nn import Linear4bit

    backbone = load_backbone(str(checkpoints[family]), dtype="float32", quantise=True)
    dense = load_backbone(str(checkpoints[family]), dtype="float32").model
    four = {name for name, module in backbone.model.named_modules() if isinstance(module, Linear4bit)}
    assert four == {
        name
        for name, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.language_model.layers.")
        if not name.endswith((".in_proj_a", ".in_proj_b"))  # the gates of linear attention
    }
    for name, parameter in backbone.model.named_parameters():
        module = name.rpartition(".")[0]
        if module in four and name.endswith("weight"):
            assert parameter.nbytes * 8 == dense.get_parameter(name).nbytes
            assert parameter.quant_state.nested  # double quantisation
        else:
            assert torch.equal(parameter, dense.get_parameter(name)), name
    frozen = [part.frozen for part in shaken(backbone, "plain").parts()]
    assert sum(frozen) == sum(parameter.numel() for parameter in dense.parameters())


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("variant", "family"),
    [
        ("plain", "qwen2_vl"),
        ("rslora", "qwen2_vl"),
        ("dora", "qwen2_vl"),
        ("plain", "qwen2_5_vl"),
        ("plain", "qwen3_vl"),
        ("plain", "qwen3_5"),
        ("dora", "qwen3_5"),
    ],
)
def test_loss_and_gradients_are_the_dequantised_dense_models(checkpoints, examples, variant, family):
    backbone = load_backbone(str(checkpoints[family]), dtype="float32", quantise=True)
    dense = opened(backbone)
    adapter, expected = shaken(backbone, variant), shaken(dense, variant)
    loss, wanted = fast(backbone, examples, 4096), fast(dense, examples, 4096)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    assert_equal(gradients(adapter, loss), gradients(expected, wanted), 2e-5)
    with torch.no_grad(), adapter.switched_off(), expected.switched_off():
        off, base = fast(backbone, examples, 4096), fast(dense, examples, 4096)
    torch.testing.assert_close(off, base, rtol=1e-6, atol=0)
    assert abs(off - loss) > 1e-3


@needs_bitsandbytes
def test_an_evaluation_leaves_the_gradients_as_they_were(examples):
    """On a CPU with AVX512-BF16, bitsandbytes would repack weights of these sizes (32s, 64s) in eval mode for good."""
    backbone = load_backbone("tiny", dtype="float32", quantise=True)
    adapter, examples = shaken(backbone, "plain"), examples[:2]
    features = FeatureCache(backbone, None)
    backbone.model.train()
    loss = fast(backbone, examples, 4096)
    before = gradients(adapter, loss)
    lessons = lessons_of(backbone, features, examples)
    assert mean_loss(Loader(backbone, features, Processes("qlora")), lessons, 4096) == pytest.approx(
        loss.item(), rel=1e-6
    )
    after = gradients(adapter, fast(backbone, examples, 4096))
    assert_equal(after, before, 1e-6)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_paged_optimizer_is_for_qlora_on_a_gpu_and_resumes_exactly(
    checkpoints, photo_folder, tmp_path, monkeypatch
):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    asked = [("qlora", gpu), ("qlora", cpu), ("lora", gpu)]
    chosen = [step.is_paged(TrainConfig(data="x", method=method), device) for method, device in asked]
    assert chosen == [True, False, False]

    # On a CPU bitsandbytes computes the same optimizer, and pages nothing.
    monkeypatch.setattr(step, "is_paged", lambda *_: True)
    straight = config(checkpoints, photo_folder, tmp_path / "straight", method="qlora")
    result = train(straight)
    monkeypatch.setattr(step, "is_paged", lambda *_: False)
    usual = adapter_of(train(straight.replace(output=str(tmp_path / "usual"))).folder)
    monkeypatch.setattr(step, "is_paged", lambda *_: True)
    paged = adapter_of(result.folder)
    assert any(not torch.equal(paged[name], usual[name]) for name in usual), "the optimizer was not used"
    for name, tensor in usual.items():
        torch.testing.assert_close(paged[name], tensor, rtol=1e-2, atol=1e-4)
    settings = straight.replace(output=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        train(settings, events=_stop_behind(4))
    assert_same(adapter_of(train(settings, resume=True).folder), paged)


@needs_bitsandbytes
def test_gradient_checkpointing_changes_nothing(checkpoints, examples):
    backbone = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32", quantise=True)
    assert_checkpointing_changes_nothing(shaken(backbone, "plain"), examples, 1e-6)


@needs_bitsandbytes
def test_adapters_share_a_base_in_four_bits_but_not_with_others(checkpoints, tmp_path, monkeypatch):
    model, short = str(checkpoints["qwen2_vl"]), Decoding(max_new_tokens=8)
    for name, variant, method in (("one", "plain", "qlora"), ("two", "dora", "qlora"), ("other", "plain", "lora")):
        backbone = load_backbone(model, dtype="float32", quantise=method == "qlora")
        shaken(backbone, variant, method).save(tmp_path / name)

    def say(speaker, **how) -> list[str]:
        return [speaker.answer(picture(i), "What is it?", decoding=short, **how) for i in range(3)]

    alone = [say(Captioner.load(adapter=tmp_path / name)) for name in ("one", "two")]
    base, *together = Captioner.load_several(None, [None, tmp_path / "one", tmp_path / "two"])
    assert [say(each) for each in together] == alone
    assert say(together[0], tuned=False) == say(base)
    assert len({str(texts) for texts in (say(base), *alone)}) == 3
    places = [
        {p.data_ptr() for p in each.backbone.model.parameters() if getattr(p, "quant_state", None)}
        for each in (base, *together)
    ]
    assert places[0] == places[1] == places[2] != set()  # the base is there once

    monkeypatch.setattr(captioner, "load_backbone", None)  # refused before anything is loaded
    with pytest.raises(AdapterError, match=r"one was trained by --method qlora.* and .*other was not") as caught:
        Captioner.load_several(None, [tmp_path / "other", tmp_path / "one"])
    assert "\n" not in str(caught.value)


@needs_bitsandbytes
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_any_adapter_answers_on_a_base_in_four_bits_where_that_is_asked_for(checkpoints, tmp_path, capsys, method):
    """As over the dense model of the values that the four bits stand for; and not as over the base's own weights."""
    model, short = str(checkpoints["qwen2_vl"]), Decoding(max_new_tokens=8)
    shaken(load_backbone(model, dtype="float32"), "plain", method).save(tmp_path / "one")
    shaken(load_backbone(model, dtype="float32", quantise=True), "plain", "qlora").save(tmp_path / "other")
    four = Captioner.load(adapter=tmp_path / "one", load_in_4bit=True)
    backbone = opened(four.backbone)
    dense = Captioner(backbone, shaken(backbone, "plain", method), FeatureCache(backbone, None), "Say it.")

    def say(speaker) -> list[str]:
        return [speaker.answer(picture(i), "What is it?", decoding=short) for i in range(4)]

    assert say(four) == say(dense) != say(Captioner.load(adapter=tmp_path / "one"))
    both = Captioner.load_several(None, [tmp_path / "one", tmp_path / "other"], load_in_4bit=True)
    assert [say(each) for each in both] == [say(four), say(Captioner.load(adapter=tmp_path / "other"))]
    with pytest.raises(AdapterError, match="was not trained by --method qlora; the base is loaded in four bits"):
        Captioner.load(adapter=tmp_path / "other").with_adapter(tmp_path / "one")  # where nobody asked for it

    picture(0).save(tmp_path / "0.png")
    command = ["caption", str(tmp_path / "0.png"), "--adapter", str(tmp_path / "one"), "--load-in-4bit"]
    assert main([*command, "--max-new-tokens", "8", "--prompt", "What is it?", "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["caption"] == say(four)[0]
    assert main([*command, "--endpoint", "http://127.0.0.1:9"]) == 2
    assert "have it quantise" in capsys.readouterr().err


@needs_bitsandbytes
def test_bitsandbytes_is_quiet_about_a_kernel_that_is_not_used_and_nothing_else(caplog):
    ops = importlib.import_module("bitsandbytes.backends.cpu.ops")
    if not hasattr(ops, "logger"):
        pytest.skip("this bitsandbytes knows no such kernel")
    ops.logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no such module")
    ops.logger.warning("Something else.")
    assert caplog.messages == ["Something else."]


@needs_bitsandbytes
def test_train_stop_go_on_load_and_caption(checkpoints, photo_folder, tmp_path, monkeypatch):
    straight = config(checkpoints, photo_folder, tmp_path / "straight", method="qlora")
    result = train(straight)
    settings = straight.replace(output=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        train(settings, events=_stop_behind(4))
    assert_same(adapter_of(train(settings, resume=True).folder), adapter_of(result.folder))

    inside = Captioner(result.adapter.backbone, result.adapter, result.features, settings.prompt)
    loaded = Captioner.load(adapter=result.folder)
    assert loaded.backbone.quantised
    images, short = [example.images[0] for example in result.held_out], Decoding(max_new_tokens=8)
    texts = [caption.text for caption in inside.caption(images, decoding=short)]
    assert [caption.text for caption in loaded.caption(images, decoding=short)] == texts
    singly = [caption.text for caption in loaded.caption(images, batch_size=1, decoding=short)]
    assert singly == texts
    scores = evaluate(loaded, result.held_out, decoding=short).scores
    assert scores.tuned != scores.base
    assert any("base in four bits" in sentence for sentence in summary(scores))

    dense = load_backbone(str(checkpoints["qwen2_vl"]))
    with pytest.raises(AdapterError, match="--method qlora; the base is loaded unquantised"):
        load_adapter(dense, result.folder / "adapter")
    contract = json.loads((result.folder / "adapter/contract.json").read_text())
    assert contract["method"] == "qlora"
    without_bitsandbytes(monkeypatch)
    with pytest.raises(ModelError, match="pip install"):
        Captioner.load(adapter=result.folder)
