"""What adapters begin as: equal to plain PEFT, kept over a stop, and delivered for the base as it was published."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.methods import method_of
from datasets import DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer
from prepared_workspace import losses, prepared_run
from safetensors.torch import load_file
from trainer.training.test_resume import stopped_at
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.methods import initial
from luthier_trainer.methods.apply import with_method
from luthier_trainer.methods.checks import check_initial
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train
from luthier_trainer.training import result

IDS = torch.arange(2, 34).reshape(2, 16)


@dataclass(frozen=True)
class Case:
    name: str
    method: dict[str, Any]
    plain: dict[str, Any]


CASES = [
    Case(
        name="gaussian",
        method={"initLoraWeights": "gaussian"},
        plain={"init_lora_weights": "gaussian"},
    ),
    Case(
        name="orthogonal",
        method={"initLoraWeights": "orthogonal"},
        plain={"init_lora_weights": "orthogonal"},
    ),
    Case(
        name="olora",
        method={"initLoraWeights": "olora"},
        plain={"init_lora_weights": "olora"},
    ),
    Case(
        name="pissa, rsLoRA, other ranks",
        method={
            "initLoraWeights": "pissa",
            "rslora": True,
            "rankPattern": {"q_proj": 2},
            "alphaPattern": {"v_proj": 3},
        },
        plain={
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    Case(
        name="pissa_niter_4",
        method={"initLoraWeights": "pissa_niter_4"},
        plain={"init_lora_weights": "pissa_niter_4"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adapters_learn_as_in_plain_peft(
    case: Case, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps of AdamW, and the logits after each."""

    def approximated(*args: Any, **options: Any) -> Any:
        torch.manual_seed(3)  # because PEFT draws other numbers in between
        return torch.svd_lowrank(*args, **options)

    monkeypatch.setattr(layer, "svd_lowrank", approximated)

    def learn(model: Any) -> torch.Tensor:
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3, weight_decay=0.1)
        found = []
        for _ in range(3):
            out = model(input_ids=IDS, labels=IDS)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(out.logits.detach())
        return torch.stack(found)

    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    set_seed(1)
    plain = get_peft_model(
        plain, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **case.plain)
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    set_seed(1)
    method = method_of(type="lora", rank=4, alpha=8, **case.method)
    ours = with_method(base, method, "CAUSAL_LM", [], deepspeed=False)
    initial.begin(ours, method, torch.device("cpu"), tmp_path / "kept", Ranks(60), "run", tiny_model)
    torch.testing.assert_close(learn(ours), learn(plain), rtol=0, atol=1e-4)

    # What is switched off leaves the base, to the last bit.
    with ours.disable_adapter(), torch.no_grad():
        left = ours(input_ids=IDS).logits
    assert all(
        torch.equal(before[n.replace("base_layer.", "")], w) for n, w in base.state_dict().items() if "lora_" not in n
    )
    torch.testing.assert_close(left, AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=IDS).logits)


def test_a_result_is_an_ordinary_adapter(
    tmp_path: Path, llama: Path, prose_data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain PEFT on the plain base gives the logits of what was trained; an attempt that resumes learns the same."""
    data = DatasetDict(train=prose_data["train"].select(range(32)), eval=prose_data["eval"].select(range(4)))
    method = {"type": "lora", "rank": 6, "alpha": 7, "rslora": True, "rankPattern": {"(q|v)_proj": 3}, "dropout": 0.1}
    method |= {"initLoraWeights": "pissa", "modulesToSave": ["norm"]}
    asked: dict[str, Any] = {"method": method, "training": {"maxSteps": 4, "learningRate": 1e-2}}
    trained: list[torch.Tensor] = []
    write = result.write

    def listening(loop: Any, *rest: Any) -> None:
        trained.append(logits(loop.model))
        write(loop, *rest)

    monkeypatch.setattr(result, "write", listening)
    run = prepared_run(tmp_path / "job", llama, data, **asked)
    metrics = train.main(run).metrics
    assert metrics is not None
    assert metrics["evalLoss"] < metrics["evalLossBefore"] - 0.01
    folder = tmp_path / "job/result"
    base = AutoModelForCausalLM.from_pretrained(llama)
    untrained = logits(base)
    plain = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(plain), trained[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(plain.merge_and_unload()), trained[0], rtol=0, atol=1e-4)
    assert (trained[0] - untrained).abs().max() > 0.1
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["init_lora_weights"]) == (12, {"(q|v)_proj": 6}, True)

    again = prepared_run(tmp_path / "again", llama, data, **asked)
    assert stopped_at(again, 2, monkeypatch).code == 75
    with monkeypatch.context() as patch:
        patch.setattr(initial, "beginning", lambda *_: pytest.fail("singular vectors are computed once"))
        assert train.main(again).code == 0
    assert losses(again) == losses(run)
    whole, resumed = (load_file(tmp_path / name / "result/adapter_model.safetensors") for name in ("job", "again"))
    assert {name for name, weight in whole.items() if not torch.equal(weight, resumed[name])} == set()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    was = model.training
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    model.train(was)
    return found


def test_what_is_kept_is_computed_anew_where_it_is_broken(tiny_model: Path, tmp_path: Path) -> None:
    method = method_of(type="lora", rank=4, initLoraWeights="olora")
    found = []
    for identity, broken in (("a", False), ("a", False), ("a", True), ("b", False)):
        if broken:
            (tmp_path / "kept" / initial.FILE).write_bytes(b"broken")
        notices.forget()
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = with_method(model, method, "CAUSAL_LM", [], deepspeed=False)
        begun = initial.begin(model, method, torch.device("cpu"), tmp_path / "kept", Ranks(60), identity, tiny_model)
        assert begun is not None
        found.append(begun.values)
        assert len([text for text in notices.given() if "initial.safetensors is broken" in text]) == int(broken)
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in found[0])


def test_the_reference_of_preferences_is_the_base(
    tmp_path: Path, tiny_model: Path, make_run: Any, pairs: list[dict[str, str]]
) -> None:
    """With PEFT's way, an adapter that is switched off would leave a base without its largest singular values."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    run = make_run(
        task="preference",
        model={"path": str(tiny_model)},
        method={"type": "lora", "initLoraWeights": "pissa"},
        dataset={"files": [str(tmp_path / "pairs.jsonl")]},
        training={"maxLength": 48, "batchSize": 8, "maxSteps": 3, "learningRate": 1e-3, "logSteps": 1},
    )
    prepare(run)
    assert train.main(run).code == 0
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-5)


@dataclass(frozen=True)
class Refused:
    name: str
    method: dict[str, Any]
    message: str


REFUSED = [
    Refused(
        name="a rank above a width",
        method={"initLoraWeights": "pissa", "rank": 33},
        message="spec.method.initLoraWeights: model.layers.0.self_attn.q_proj has 32 singular values, and its rank is",
    ),
    Refused(
        name="an odd rank",
        method={"initLoraWeights": "orthogonal", "rank": 4, "rankPattern": {"up_proj": 5}},
        message="spec.method.initLoraWeights: orthogonal needs even ranks, and that of model.layers.0.mlp.up_proj is 5",
    ),
    Refused(
        name="an embedding",
        method={"initLoraWeights": "olora", "rank": 4, "targetModules": ["embed_tokens"]},
        message="spec.method.initLoraWeights: olora is for linear modules, and model.embed_tokens is none",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_adapters_that_cannot_begin_so_are_refused(case: Refused) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}
    config = LlamaConfig(num_hidden_layers=2, **sizes)
    with pytest.raises(Failure) as failure:
        check_initial(config, "causal-lm", method_of(type="lora", **case.method))
    assert failure.value.message.startswith(case.message)
