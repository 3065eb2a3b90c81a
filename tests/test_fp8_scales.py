"""Scales of fp8 products fit from the first number on: in training, after a resume, and in inference.

The expectation is the same model in bf16. Models start as ports initialise them, and batches are large enough for the
gradient of a mean loss to be too small for fp8 unscaled.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.parallel import DistributedDataParallel

from biote.port import ModelPort, port_named
from biote.runtime.precision import MARGIN
from biote.runtime.verify import relative_l2

pytestmark = [pytest.mark.gpu, pytest.mark.fp8]
RECIPES = ["delayed", "current", "block"]
ROWS, LONGEST, WORDS = 24, 200, 40


def build(port: ModelPort, layer_precision: str = "fp8", **fields: Any) -> Any:
    """The same weights for whatever fields."""
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
    config = port.config_class(**shape, vocab_size=WORDS, engine="te", layer_precision=layer_precision, **fields)
    model = port.classes["AutoModelForMaskedLM"](config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * config.initializer_range)
    return model.to("cuda", torch.bfloat16)


def batch_of(rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(LONGEST) < torch.randint(40, LONGEST + 1, (rows, 1), generator=generator)).long()
    ids = torch.randint(5, 24, mask.shape, generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {key: tensor.cuda() for key, tensor in batch.items()}


def gradients(model: Any, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what trains in the blocks, added up over the batches."""
    model.train().zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if ".layers." in name and p.requires_grad}
    assert found
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], least_cosine: float = 0.98) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient.any():
            cosine = float(cosine_similarity(found[name].flatten(), gradient.flatten(), 0))
            assert cosine > least_cosine, f"{name}: cosine {cosine:.4f}"  # 0 where all of it has vanished
    norms = [torch.cat([gradient.flatten() for gradient in one.values()]).norm() for one in (found, expected)]
    assert abs(float(norms[0] / norms[1]) - 1) < 0.05


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits[batch["attention_mask"].bool()].double()


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_the_first_steps(port, recipe, recomputed):
    expected = gradients(build(port, "bf16"), batch_of())
    model = build(port, fp8_recipe=recipe)
    if recomputed:
        model.gradient_checkpointing_enable()
    for _ in range(3):
        assert_close(gradients(model, batch_of()), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_the_first_step_after_a_resume(port, recipe, tmp_path: Path):
    model = build(port, fp8_recipe=recipe)
    gradients(model, batch_of())
    model.save_pretrained(tmp_path)
    resumed = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).cuda()
    assert resumed.config.fp8_recipe == recipe
    assert_close(gradients(resumed, batch_of()), gradients(build(port, "bf16"), batch_of()))


def test_gradients_of_the_first_step_add_up(port):
    batches = [batch_of(seed=1), batch_of(rows=5, seed=2)]
    assert_close(gradients(build(port), *batches), gradients(build(port, "bf16"), *batches))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_of_the_first_step_after_inference(port, mode):
    expected = gradients(build(port, "bf16"), batch_of())
    model = build(port)
    with mode():
        model.eval()(**batch_of(rows=2, seed=3))
    model.gradient_checkpointing_enable()
    for _ in range(2):
        assert_close(gradients(model, batch_of()), expected)


def test_a_first_step_without_gradients_sets_no_scale(port):
    """As of a head that starts at zero."""
    model = build(port).train()
    (0 * model(**batch_of()).loss).backward()
    assert_close(gradients(model, batch_of()), gradients(build(port, "bf16"), batch_of()))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own affair
def test_gradients_of_adapters_at_the_first_steps(port):
    """LoRA's B is zero at first, so that A has no gradient before the second step."""
    found = []
    for precision in ("fp8", "bf16"):
        options = LoraConfig(r=4, target_modules=["qkv", "proj", "fc1", "fc2"])
        adapted = get_peft_model(build(port, precision), options)
        draw(adapted, "lora_A")
        first = gradients(adapted, batch_of())
        draw(adapted, "lora_B")
        found.append((first, gradients(adapted, batch_of())))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, least_cosine=0.93)  # a matrix of few numbers, behind another


def draw(adapted: Any, which: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if which in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graphed"])
def test_the_first_call_in_inference(port, graphed):
    batch, reference = batch_of(), logits(build(port, "bf16"), batch_of())
    current = relative_l2(logits(build(port, fp8_recipe="current"), batch), reference)
    model = build(port, cuda_graphs=graphed)
    for _ in range(3):
        assert 0 < relative_l2(logits(model, batch), reference) < 1.2 * current
    again = logits(model, batch)
    logits(model, batch_of(seed=1))
    assert torch.equal(logits(model, batch), again), "no call moves the scales"


def test_what_is_larger_than_at_the_first_call_in_inference_fits(port):
    """Scales leave room, by the largest numbers that TE has seen itself; loaded weights have scales of their own."""
    model = build(port)
    logits(model, batch_of())
    room = 448 / 2**MARGIN  # 448 is the largest number of e4m3
    for at in (0, 1):  # input, weight
        quantizers = [product.quantizers["scaling_fwd"][at] for product in products(model)]
        assert [float(each.scale * each.amax) for each in quantizers] == pytest.approx([room] * 16, rel=1e-3)
    model.load_state_dict({key: 20 * tensor for key, tensor in build(port).state_dict().items()})
    scaled = [
        float(each.quantizers["scaling_fwd"][1].scale * each.weight.detach().abs().max()) for each in products(model)
    ]
    assert scaled == pytest.approx([room] * 16, rel=1e-3)


def products(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "quantizers")]


def test_quantised_weights_have_scales_of_their_own(port):
    """They hold their numbers to fp8's three bits, which weights of 0.02 do not at a scale of 1."""
    model = build(port)
    for ours, exact in zip(products(model.with_quantized_weights()), products(model), strict=True):
        held = ours.weight.dequantize().double()
        assert relative_l2(held, exact.weight.detach().double()) < 0.028


def first_step_of_a_rank(rank: int, name: str, folder: str) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", f"file://{folder}/store", rank=rank, world_size=2)
    batch = batch_of()
    halves = {key: tensor.chunk(2)[rank].cuda() for key, tensor in batch.items()}
    count = (batch["labels"] != -100).sum() / 2
    model = build(port_named(name)).train()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("contact_head" not in parameter_name)  # no loss reaches it
    model = DistributedDataParallel(model, device_ids=[rank])
    steps = []
    for _ in range(2):
        model.zero_grad()
        (model(**halves).loss * (halves["labels"] != -100).sum() / count).backward()
        named = model.module.named_parameters()
        steps.append({name: p.grad.double().cpu() for name, p in named if ".layers." in name})
    torch.save(steps, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.multi_gpu
def test_gradients_of_the_first_steps_on_two_gpus(port, tmp_path: Path):
    torch.multiprocessing.spawn(first_step_of_a_rank, (port.name, str(tmp_path)), nprocs=2)
    expected = {name: gradient.cpu() for name, gradient in gradients(build(port, "bf16"), batch_of()).items()}
    for rank in range(2):
        for step in torch.load(tmp_path / f"{rank}.pt"):
            assert_close(step, expected)
