"""GRPO: prompts are checked, learnt from as TRL does, and a run survives as any other."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.quick import quick
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from prepared_workspace import without_the_machine
from safetensors.torch import load_file
from trainer.tasks.stopping import stopped_at
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from luthier_api.exitcodes import ExitCode
from luthier_api.grpo import RewardFunction
from luthier_api.run import FineTuneRun
from luthier_api.variables import Variables
from luthier_trainer.prepare import main as prepare
from luthier_trainer.publish.model_card import card
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks import reward_code
from luthier_trainer.tasks.rewards import FUNCTIONS, Completions, load_model
from luthier_trainer.training import main as train
from luthier_trainer.workspace.prepared import read_prepared

FULL = {"type": "full"}
LORA = {"type": "lora", "rank": 4}
COURSE = {"maxLength": 24, "batchSize": 8, "maxSteps": 5, "learningRate": 1e-2, "logSteps": 1}
REWARDS = [{"type": "regex", "pattern": "[aeiou]{2}"}, {"type": "length", "tokens": 4, "weight": 0.5}]
GRPO = {"generations": 4, "maxCompletionLength": 8, "rewards": REWARDS}


def prompts(paragraphs: list[str]) -> list[dict[str, str]]:
    """10 prompts of a few words, with the word that comes next as their answer."""
    words = [text.split() for text in paragraphs if len(text.split()) > 6]
    return [{"prompt": " ".join(each[:3]), "answer": each[3]} for each in words[:10]]


@pytest.fixture
def reinforce(make_run: Any, tmp_path: Path, paragraphs: list[str]) -> Callable[..., FineTuneRun]:
    """The run config of a job over `rows`, and other rows that are held out."""

    def make(
        name: str = "job",
        rows: list[dict[str, Any]] | None = None,
        held_out: list[dict[str, Any]] | None = None,
        **spec: Any,
    ) -> FineTuneRun:
        dataset = {}
        for role, some in (("files", rows or prompts(paragraphs)), ("evalFiles", held_out)):
            if some:
                file = tmp_path / f"{name}-{role}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in some))
                dataset[role] = [str(file)]
        given = {"task": "grpo", "dataset": dataset, "method": LORA, "training": COURSE, "grpo": GRPO}
        return make_run(name, **given | spec)

    return make


@dataclass(frozen=True)
class Rated:
    name: str
    reward: dict[str, Any]
    completions: list[str]
    expect: list[float]
    tokens: list[int] = field(default_factory=list)
    column: list[str] = field(default_factory=list)


RATED = [
    Rated(
        name="exact match, without blanks around it",
        reward={"type": "exactMatch", "column": "answer"},
        completions=[" 42\n", "It is 42", "43"],
        column=["42", "42", "42 "],
        expect=[1, 0, 0],
    ),
    Rated(
        name="exact match of what a pattern finds last",
        reward={"type": "exactMatch", "column": "answer", "pattern": r"#### (\S+)"},
        completions=["#### 1 or rather #### 42", "42", "#### 41"],
        column=["42", "42", "42"],
        expect=[1, 0, 0],
    ),
    Rated(
        name="regular expression, found anywhere",
        reward={"type": "regex", "pattern": "<answer>.+</answer>"},
        completions=["so <answer>1</answer>.", "<answer></answer>"],
        expect=[1, 0],
    ),
    Rated(
        name="length",
        reward={"type": "length", "tokens": 10},
        completions=["", "", "", ""],
        tokens=[10, 5, 15, 40],
        expect=[1, 0.5, 0.5, 0],
    ),
    Rated(
        name="length at most",
        reward={"type": "length", "tokens": 10, "shorter": True},
        completions=["", "", ""],
        tokens=[10, 5, 15],
        expect=[1, 1, 0.5],
    ),
    Rated(
        name="JSON",
        reward={"type": "json"},
        completions=['{"a": 1}', " [1] ", "```json\n{}\n```", "{'a': 1}"],
        expect=[1, 1, 0, 0],
    ),
    Rated(
        name="JSON with keys",
        reward={"type": "json", "keys": ["a"]},
        completions=['{"a": 1, "b": 2}', '{"b": 2}', '["a"]'],
        expect=[1, 0, 0],
    ),
]


@pytest.mark.parametrize("case", RATED, ids=lambda case: case.name)
def test_what_completions_are_worth(case: Rated) -> None:
    reward = RewardFunction.model_validate(case.reward)
    given = Completions([], case.completions, case.tokens, {"answer": case.column})
    assert FUNCTIONS[reward.type](reward)(given) == case.expect


@dataclass(frozen=True)
class Refusal:
    name: str
    message: str
    grpo: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)


REFUSALS = [
    Refusal(
        name="a pattern that does not compile",
        grpo={"rewards": [{"type": "regex", "pattern": "(a"}]},
        message=r"spec\.grpo\.rewards\[0\]\.pattern: \(a is not a regular expression of Python: missing \)",
    ),
    Refusal(
        name="a pattern without the part that is the answer",
        grpo={"rewards": [{"type": "exactMatch", "column": "answer", "pattern": "#### .+"}]},
        message=r"spec\.grpo\.rewards\[0\]\.pattern: #### \.\+ has no group",
    ),
    Refusal(
        name="a column that does not exist",
        grpo={"rewards": [REWARDS[0], {"type": "exactMatch", "column": "anwser"}]},
        message=r'spec\.grpo\.rewards\[1\]\.column: no column "anwser" .* Did you mean "answer"\?',
    ),
    Refusal(
        name="a row without an answer",
        grpo={"rewards": [{"type": "exactMatch", "column": "answer"}]},
        row={"answer": None},
        message=r'spec\.grpo\.rewards\[0\]\.column: column "answer" .* holds no text or number in row 0',
    ),
    Refusal(
        name="code that does not exist",
        grpo={"rewards": [{"type": "python", "file": "/no/rewards.py"}]},
        message=r"spec\.grpo\.rewards\[0\]\.file: /no/rewards\.py: No such file or directory\. Name a file that",
    ),
    Refusal(
        name="a column that does not exist, for code",
        grpo={"rewards": [{"type": "python", "file": "/no/rewards.py", "columns": ["answer", "anwser"]}]},
        message=r'spec\.grpo\.rewards\[0\]\.columns\[1\]: no column "anwser" .* Did you mean "answer"\?',
    ),
    Refusal(
        name="a prompt that is blank",
        row={"prompt": " "},
        message=r'spec\.dataset\.columns\.prompt: column "prompt" .* is blank in 1 of 10 rows',
    ),
    Refusal(
        name="no prompt leaves room for a completion",
        spec={"training": COURSE | {"maxLength": 9}},
        message=r"spec\.training\.maxLength: no training prompt has 1 tokens or fewer",
    ),
    Refusal(
        name="an adapter on the head",
        spec={"method": LORA | {"targetModules": ["q_proj", "lm_head"]}},
        message=r"spec\.method\.targetModules\[1\]: TRL reads the weights of lm_head",
    ),
]


CODE = """
import os

def reward(completions, prompts, answer, completion_ids, **_):
    return [float(len(ids) + (row in text)) for text, ids, row in zip(completions, completion_ids, answer)]
"""


@dataclass(frozen=True)
class Coded:
    """A file whose function cannot be used."""

    name: str
    body: str
    message: str
    reward: dict[str, Any] = field(default_factory=dict)


CODED = [
    Coded(
        name="no Python",
        body="def reward(:",
        message=r"^spec\.grpo\.rewards\[0\]\.file: .*/rewards\.py is no Python: invalid syntax .*line 1",
    ),
    Coded(
        name="a function that does not exist",
        body="def rate(completions, **_): ...",
        message=r"^spec\.grpo\.rewards\[0\]\.function: reward of .*/rewards\.py does not exist \(functions: rate\)",
    ),
    Coded(
        name="an exception",
        body="import math\n\ndef graded(completions, **_):\n    return [math.log(len(text)) for text in completions]",
        reward={"function": "graded"},
        message=r"\.function: graded of .* raised ValueError: math domain error \(line 4 of .*/rewards\.py\)",
    ),
    Coded(
        name="an exception while the file is read",
        body="import no_such_package",
        message=r"\.function: reward of .* raised ModuleNotFoundError: No module named 'no_such_package' \(line 1 of",
    ),
    Coded(
        name="an argument that is not there",
        body="def reward(completions, wanted): ...",
        message=r"\.function: reward of .* raised TypeError: reward\(\) got an unexpected keyword argument",
    ),
    Coded(
        name="no list",
        body="def reward(completions, **_): return 1.0",
        message=r"\.function: reward of .* has returned a value of type float instead of a list of numbers",
    ),
    Coded(
        name="too few rewards",
        body="def reward(completions, **_): return [1.0]",
        message=r"\.function: reward of .* has returned 1 rewards for 2 completions",
    ),
    Coded(
        name="no numbers",
        body="def reward(completions, **_): return [1.0, '2']",
        message=r"\.function: .* has returned a value of type str as the reward of completion 1 instead of a number",
    ),
    Coded(
        name="nothing",
        body="def reward(completions, **_): return [None, 1.0]",
        message=r"\.function: .* has returned None as the reward of completion 0 instead of a number",
    ),
    Coded(
        name="NaN",
        body="def reward(completions, **_): return [float('nan'), 1.0]",
        message=r"\.function: .* has returned nan as the reward of completion 0; return a finite number",
    ),
    Coded(
        name="a function that hangs",
        body="import time\n\ndef reward(completions, **_): time.sleep(60)",
        reward={"timeoutSeconds": 1},
        message=r"\.timeoutSeconds: reward of .* has not rated 2 completions within 1 s; make it faster, or raise it",
    ),
    Coded(
        name="the end of its process",
        body="import os\n\ndef reward(completions, **_): os._exit(3)",
        message=r"\.function: reward of .*/rewards\.py has ended its process \(exit code 3\)",
    ),
]


@pytest.mark.parametrize("case", CODED, ids=lambda case: case.name)
def test_code_that_does_not_rate_is_refused(case: Coded, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(case.body)
    reward = RewardFunction.model_validate({"type": "python", "file": str(tmp_path / "rewards.py")} | case.reward)
    with pytest.raises(Failure, match=case.message) as refused:
        rate_once(reward, tmp_path / "copy.py")
    assert refused.value.code == ExitCode.INVALID_SPEC


def rate_once(reward: RewardFunction, copy: Path, **given: Any) -> list[float]:
    """The rewards of two completions by new code."""
    reward_code.keep(reward, "spec.grpo.rewards[0]", copy)
    rate = reward_code.RatedByCode(copy, reward, "spec.grpo.rewards[0]")
    asked = {"prompts": ["a", "b"], "texts": ["", "x"], "tokens": [1, 2], "ids": [[5], [6, 7]]} | given
    try:
        return rate(Completions(**asked))
    finally:
        rate.stop()


def test_code_is_called_as_by_trl(tmp_path: Path) -> None:
    """With conversations as TRL writes them, and columns as they are in the rows."""
    given = tmp_path / "given"
    (tmp_path / "code").write_text(
        "import json, numpy\n\ndef seen(**given):\n    print('for the log')\n"
        f"    with open({str(given)!r}, 'w') as file: json.dump(given, file)\n    return numpy.array([1, 0.5])"
    )
    reward = RewardFunction.model_validate(
        {"type": "python", "file": str(tmp_path / "code"), "function": "seen", "columns": ["answer"]}
    )
    prompts = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    found = rate_once(
        reward,
        tmp_path / "copy.py",
        prompts=[json.dumps(prompt) for prompt in prompts],
        columns={"answer": [42, [1, None]], "other": ["", ""]},
        messages=True,
    )
    assert found == [1, 0.5]
    assert json.loads(given.read_text()) == {
        "prompts": prompts,
        "completions": [[{"role": "assistant", "content": text}] for text in ("", "x")],
        "completion_ids": [[5], [6, 7]],
        "answer": [42, [1, None]],
    }


LOOK = """
import glob

def reward(completions, **_):
    found = 0
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as file:
                found += b"hf_very_" + b"SECRET" in file.read()
        except OSError:
            pass
    return [found] * len(completions)
"""


@pytest.mark.parametrize(("hidden", "expect"), [(True, [0.0, 0.0]), (False, [1.0, 1.0])])
def test_code_sees_no_credentials(hidden: bool, expect: list[float], tmp_path: Path) -> None:
    """Neither in its own environment nor in that of the process that has started it, as a user without capabilities."""
    (tmp_path / "rewards.py").write_text(LOOK.replace("SECRET", f"secret_{hidden}"))
    program = (
        "import sys\nfrom pathlib import Path\nfrom luthier_api.grpo import RewardFunction\n"
        "from luthier_trainer.runtime.undumpable import hide_process\n"
        "from luthier_trainer.tasks import reward_code\nfrom luthier_trainer.tasks.rewards import Completions\n"
        f"if {hidden}: hide_process()\n"
        f"reward = RewardFunction.model_validate({{'type': 'python', 'file': '{tmp_path}/rewards.py'}})\n"
        f"rate = reward_code.RatedByCode(Path('{tmp_path}/rewards.py'), reward, 'spec')\n"
        "print(rate(Completions(['a', 'b'], ['', ''], [1, 1], ids=[[1], [1]])))"
    )
    without = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    asked = [*without, sys.executable, "-c", program]
    environment = os.environ | {Variables.TOKEN: f"hf_very_secret_{hidden}"}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(expect), done.stderr[-2000:]


def test_code_rewards_a_training(reinforce: Callable[..., FineTuneRun], paragraphs: list[str], tmp_path: Path) -> None:
    """As it was when the job was prepared."""
    file = tmp_path / "rewards.py"
    file.write_text(CODE)
    rewards = [{"type": "python", "file": str(file), "columns": ["answer"]}]
    prepare.main(run := reinforce(grpo=GRPO | {"rewards": rewards}, training=COURSE | {"maxSteps": 1}))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    origins = {origin.field: origin for origin in read_prepared(run).origins}
    assert origins["spec.grpo.rewards[0].file"].digest == digest
    assert any(
        f"spec.grpo.rewards[0]: the pods run reward of {file} as it is now (SHA-256 {digest[:12]}), without"
        " credentials. On the first row it returns 1 for no text, and " in text
        for text in notices.given()
    )
    file.write_text(CODE + "# other")
    metrics = train.main(run).metrics or {}
    assert metrics["trainReward"] >= 1
    assert any(text.startswith(f"spec.grpo.rewards[0].file: {file} has changed since") for text in notices.given())
    with pytest.raises(Failure, match=r"^spec\.grpo\.rewards\[0\]\.file: .* has changed since this job was prepared"):
        prepare.main(run)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_what_prepare_refuses(case: Refusal, reinforce: Callable[..., FineTuneRun], paragraphs: list[str]) -> None:
    first, *others = prompts(paragraphs)
    with pytest.raises(Failure, match=case.message):
        prepare.main(reinforce(rows=[first | case.row, *others], grpo=GRPO | case.grpo, **case.spec))


def plain_trl(run: FineTuneRun, folder: Path, model_path: Path, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A script of TRL's documentation over the same rows: its log."""
    import re

    from trl import GRPOConfig, GRPOTrainer

    def vowels(completions: list[str], **_: Any) -> list[float]:
        return [float(re.search("[aeiou]{2}", text) is not None) for text in completions]

    def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [max(1 - abs(len(ids) - 4) / 4, 0) for ids in completion_ids]

    spec = run.spec
    config = GRPOConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=spec.training.micro_batch_size or 8,
        gradient_accumulation_steps=8 // (spec.training.micro_batch_size or 8),
        learning_rate=1e-2,
        num_generations=4,
        max_completion_length=8,
        beta=spec.grpo.beta,
        loss_type=spec.grpo.loss_type,
        reward_weights=[1.0, 0.5],
        seed=spec.training.seed,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    adapters = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model=str(model_path),
        reward_funcs=[vowels, length],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=None if spec.method.type == "full" else adapters,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@dataclass(frozen=True)
class Learning:
    name: str
    method: dict[str, Any]
    grpo: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


LEARNINGS = [
    Learning(name="all weights, held to a second model", method=FULL, grpo={"beta": 0.1}),
    Learning(name="adapters, held to the model without them", method=LORA, grpo={"beta": 0.1, "lossType": "grpo"}),
    Learning(name="adapters, two micro-batches", method=LORA, training={"microBatchSize": 4}),
    Learning(
        name="adapters, a function of Python",
        method=LORA,
        grpo={"rewards": [{"type": "python", "file": "CODE", "function": "vowels"}, REWARDS[1]]},
    ),
]
VOWELS = """
import re

def vowels(completions, **_):
    return [float(re.search("[aeiou]{2}", text) is not None) for text in completions]
"""


@pytest.mark.parametrize("case", LEARNINGS, ids=lambda case: case.name)
def test_losses_and_rewards_are_those_of_trl(
    case: Learning,
    reinforce: Callable[..., FineTuneRun],
    paragraphs: list[str],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    course = COURSE | {"maxSteps": 2} | case.training
    (tmp_path / "rewards.py").write_text(VOWELS)
    grpo = json.loads(json.dumps(GRPO | case.grpo).replace("CODE", str(tmp_path / "rewards.py")))
    run = reinforce(method=case.method, grpo=grpo, training=course)
    prepare.main(run)
    train.main(run)
    expect = plain_trl(run, tmp_path / "trl", tiny_model, prompts(paragraphs))
    found = history(run)
    for name in ("loss", "grad_norm", "reward", "reward_std", "completions/mean_length", "kl"):
        values = [entry.get(name) for entry in expect]
        if None not in values:
            assert [entry[name] for entry in found] == pytest.approx(values, abs=1e-5), name
    first = f"rewards/{grpo['rewards'][0]['type']}/mean"
    assert [entry[first] for entry in found] == [entry["rewards/vowels/mean"] for entry in expect]


def history(run: FineTuneRun) -> list[dict[str, Any]]:
    """The reports of the training, from the newest checkpoint."""
    newest = max((Path(run.workspace) / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    entries = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


STOPPED = [
    Learning(name="all weights", method=FULL, grpo={"beta": 0.1}),
    Learning(name="adapters, held to the model without them", method=LORA, grpo={"beta": 0.1}),
    Learning(
        name="adapters with dropout on a model in 4 bits, two micro-batches",
        method={"type": "qlora", "rank": 4, "dropout": 0.1},
        training={"microBatchSize": 4},
    ),
]


@pytest.mark.parametrize("case", quick(STOPPED, "adapters with dropout on a model in 4 bits, two micro-batches"))
def test_a_stopped_run_goes_on_to_the_last_bit(
    case: Learning,
    reinforce: Callable[..., FineTuneRun],
    paragraphs: list[str],
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 5 prompts and 2 a step, an epoch has 3 steps, the last one filled up. The run is stopped in the second."""
    course = COURSE | {"maxSteps": 5, "evalSteps": 4} | case.training
    runs = []
    for name in ("whole", "stopped"):
        run = reinforce(
            name,
            prompts(paragraphs)[:5],
            prompts(paragraphs)[5:8],
            method=case.method,
            grpo=GRPO | case.grpo,
            training=course,
            model={"path": str(llama)},
        )
        prepare.main(run)
        runs.append(run)
    train.main(runs[0])
    message = stopped_at(runs[1], 4, monkeypatch)
    assert (message.code, message.step, message.saved) == (75, 4, True)
    train.main(runs[1])
    entries = [[{k: v for k, v in e.items() if k not in TIMES} for e in history(run)] for run in runs]
    assert entries[0] == entries[1]
    results = [Path(run.workspace) / "result" for run in runs]
    for file in results[0].glob("*.safetensors"):
        other = load_file(results[1] / file.name)
        for name, tensor in load_file(file).items():
            assert tensor.equal(other[name]), name
    metrics = [json.loads((result / "metrics.json").read_text()) for result in results]
    assert without_the_machine(metrics[0]) == without_the_machine(metrics[1])
    assert {"reward", "rewardStd", "reward.regex", "reward.length", "zeroVarianceShare", "trainReward"} <= set(
        metrics[0]
    )
    assert ("kl" in metrics[0]) == ("beta" in case.grpo)


TIMES = ("step_time",)


def save_judge(folder: Path, base: Path, template: str | None) -> None:
    """A reward model with random weights."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_conversations_are_rated_by_a_reward_model(
    reinforce: Callable[..., FineTuneRun], paragraphs: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts(paragraphs)]
    judge = tmp_path / "judge"
    rewards = [{"type": "model", "model": {"path": str(judge)}}, {"type": "json"}]
    run = reinforce(
        rows=rows,
        dataset={"files": [str(tmp_path / "job-files.jsonl")], "chatTemplate": {"text": TEMPLATE}},
        grpo=GRPO | {"rewards": rewards},
        training=COURSE | {"maxLength": 48, "maxSteps": 2},
    )
    save_judge(judge, tiny_model, None)
    with pytest.raises(Failure, match=r"^spec\.grpo\.rewards\[0\]\.model.*: prompts are messages, and the tokenizer"):
        prepare.main(run)
    save_judge(judge, tiny_model, TEMPLATE)
    prepare.main(run)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    first = load_from_disk(read_prepared(run).dataset_path)["train"][0]
    text = f"user: {prompts(paragraphs)[0]['prompt']}{tokenizer.eos_token}assistant: "
    assert tokenizer.decode(first["prompt_ids"]) == text

    rated = load_model(judge, torch.device("cpu"))
    prompt = json.dumps(rows[0]["prompt"])
    found = rated(Completions([prompt] * 2, ["Yes.", "No, never."], [], messages=True))
    plain = AutoModelForSequenceClassification.from_pretrained(judge)
    with torch.no_grad():
        for answer, reward in zip(("Yes.", "No, never."), found, strict=True):
            ids = tokenizer(f"{text}{answer}{tokenizer.eos_token}", return_tensors="pt")["input_ids"]
            assert reward == pytest.approx(plain(ids).logits.item(), abs=1e-5)

    metrics = train.main(run).metrics or {}
    assert metrics["trainReward"] != 0
    given = "\n".join(notices.given())
    assert "spec.grpo.rewards: json was 0 for each completion of the first 2 reports" in given
    text = card(run, read_prepared(run), Path(run.workspace) / "result")
    for expected in ("- grpo", "| Task | grpo |", "| generations | 4 |", "AutoPeftModelForCausalLM"):
        assert expected in text


def test_a_model_that_is_no_reward_model_is_refused(reinforce: Callable[..., FineTuneRun], tiny_model: Path) -> None:
    run = reinforce(grpo=GRPO | {"rewards": [{"type": "model", "model": {"path": str(tiny_model)}}]})
    with pytest.raises(Failure, match=r"^spec\.grpo\.rewards\[0\]\.model\.path: .* is no reward model"):
        prepare.main(run)


def test_all_completions_alike_give_no_gradient(reinforce: Callable[..., FineTuneRun]) -> None:
    run = reinforce(grpo=GRPO | {"rewards": [{"type": "json"}]}, training=COURSE | {"maxSteps": 1})
    prepare.main(run)
    train.main(run)
    assert any("the same reward for 100% of the prompts" in notice for notice in notices.given())


def test_equal_prompts_are_left_out_once_asked(reinforce: Callable[..., FineTuneRun], paragraphs: list[str]) -> None:
    rows = [{"prompt": f"{text[:20]} {number}"} for number, text in enumerate(paragraphs[:8])]
    asked = reinforce(rows=[rows[0], *rows]).spec
    run = reinforce(rows=[rows[0], *rows], dataset=asked.dataset.dump() | {"deduplicate": "exact"})
    prepare.main(run)
    assert len(load_from_disk(read_prepared(run).dataset_path)["train"]) == len(rows)
    assert any("1 of 9 training rows" in text for text in notices.given())
