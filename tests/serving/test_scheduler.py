"""Continuous batching over several adapters, against `generate` and PEFT, token by token."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("starlette")

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.generation.language_model import GenerationRequest, ScoreRequest
from flacuna_jax.huggingface.adapter import read_adapter
from flacuna_jax.inference import ModelAddress, ModelLoader
from flacuna_jax.serving import scheduler as scheduling
from flacuna_jax.serving.jobs import Event, Failed, Finished, Job, Progress
from flacuna_jax.serving.programs import LENGTHS
from flacuna_jax.serving.scheduler import Refused, Scheduler
from tests.serving.models import ADAPTERS, make_adapter, make_adapters, prepared


@pytest.fixture(scope="module")
def adapters(story_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(tmp_path_factory.mktemp("adapters"), story_llama)


@pytest.fixture(scope="module")
def scheduler(story_llama: Path, adapters: dict[str, Path]) -> Iterator[Scheduler]:
    """Prompts are filled in pieces of 64 tokens, one in a turn."""
    patch = pytest.MonkeyPatch()
    patch.setattr(scheduling, "PATIENCE", 0)
    patch.setattr(scheduling, "LENGTHS", LENGTHS[:1])
    found, _ = prepared(story_llama, adapters, "--rows", "8", "--context", "320", "--waiting", "64")
    found.begin()
    yield found
    found.stop()
    patch.undo()


class Heard:
    """Collects the events of one job."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def tell(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def last(self) -> Event:
        assert self.ended.wait(120)
        return self.events[-1]

    def finished(self) -> Finished:
        event = self.last()
        assert isinstance(event, Finished), event
        return event


def submit(scheduler: Scheduler, name: str, request: GenerationRequest, **options: bool | float) -> tuple[Job, Heard]:
    heard = Heard()
    deadline = time.monotonic() + float(options.pop("seconds", 120))
    job = Job(scheduler.models.offered[name], request, heard.tell, deadline, **options)
    scheduler.submit([job])
    return job, heard


def mixed_requests(count: int) -> list[tuple[str, GenerationRequest]]:
    """Over three models, with prompts of 3 to 250 tokens; every second one begins with the same 100 tokens."""
    rng = np.random.default_rng(0)
    header = rng.integers(3, 2048, 100).tolist()
    made = []
    for index in range(count):
        length = int(rng.integers(3, 150))
        prompt = (1, *(header if index % 2 == 0 else []), *rng.integers(3, 2048, length).tolist())
        made.append((("base", *ADAPTERS)[index % 3], GenerationRequest(prompt, 3 + index % 12)))
    return made


def test_mixed_requests_equal_generate_one_by_one_and_peft(
    scheduler: Scheduler, story_llama: Path, adapters: dict[str, Path], torch: ModuleType, transformers: ModuleType
) -> None:
    peft = pytest.importorskip("peft")
    requests = mixed_requests(32)
    running = [submit(scheduler, name, request, scored=True)[1] for name, request in requests]
    answers = [heard.finished() for heard in running]
    assert any(answer.shared for answer in answers)
    reference = transformers.LlamaForCausalLM.from_pretrained(story_llama, dtype=torch.float32).eval()
    theirs = None
    for name, path in adapters.items():
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(reference, path, adapter_name=name).eval()
        else:
            theirs.load_adapter(path, adapter_name=name)
    for (name, request), answer in zip(requests, answers, strict=True):
        inputs = torch.tensor([request.prompt])
        settings = {"do_sample": False, "max_new_tokens": request.max_new_tokens, "pad_token_id": 0}
        if name == "base":
            with theirs.disable_adapter():
                output = theirs.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **settings)
        else:
            theirs.set_adapter(name)
            output = theirs.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **settings)
        new = output[0, inputs.shape[1] :].tolist()
        assert [score.token for score in answer.scores] == (new[: new.index(2)] if 2 in new else new)


@pytest.mark.slow  # `generate` compiles programs for each size of prompts
def test_mixed_requests_equal_generate_one_by_one(
    scheduler: Scheduler, story_llama: Path, adapters: dict[str, Path]
) -> None:
    requests = mixed_requests(32)
    running = [submit(scheduler, name, request)[1] for name, request in requests]
    loader = ModelLoader("float32")
    models = {name: loader.load(ModelAddress(story_llama, adapters.get(name))) for name in ("base", *adapters)}
    for (name, request), heard in zip(requests, running, strict=True):
        assert heard.finished().generation == models[name].generate([request])[0]


@pytest.mark.slow
def test_samples_equal_those_of_generate(scheduler: Scheduler, story_llama: Path) -> None:
    """Rows with different settings in one batch."""
    model = ModelLoader("float32").load(ModelAddress(story_llama))
    prompt = (1, *model.tokenizer.encode("Once upon a time"))
    requests = [
        GenerationRequest(prompt, 8, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        for seed, (temperature, top_k, top_p) in enumerate([(0.0, None, None), (1.0, None, None), (0.8, 5, 0.9)])
    ]
    running = [submit(scheduler, "base", request)[1] for request in requests]
    for request, heard in zip(requests, running, strict=True):
        assert heard.finished().generation == model.generate([request])[0]


def test_scores_of_prompts_and_answers_equal_the_scorer(scheduler: Scheduler, story_llama: Path) -> None:
    model = ModelLoader("float32").load(ModelAddress(story_llama))
    prompt = tuple(np.random.default_rng(1).integers(3, 2048, 150).tolist())
    answer = submit(scheduler, "base", GenerationRequest(prompt, 3), scored=True, scores_prompt=True)[1].finished()
    assert [score.token for score in answer.prompt_scores] == list(prompt[1:])
    whole = (*prompt, *(score.token for score in answer.scores))
    wanted = [ScoreRequest(whole[:i], (whole[i],)) for i in range(1, len(whole))]
    expected = [score.log_probability for score in model.loglikelihood(wanted)]
    # float32: the same logits, in pieces and with a cache.
    found = [score.log_probability for score in (*answer.prompt_scores, *answer.scores)]
    assert found == pytest.approx(expected, abs=1e-4)
    for score in answer.prompt_scores:
        assert max(value for _, value in score.likely) >= score.log_probability


def test_a_stream_is_the_answer_in_pieces(scheduler: Scheduler) -> None:
    prompt = (1, *scheduler.models.offered["base"].tokenizer.encode("One day"))
    heard = submit(scheduler, "base", GenerationRequest(prompt, 24, stop=("Lily",)), streams=True)[1]
    whole = heard.finished().generation.text
    told = "".join(event.text for event in heard.events if isinstance(event, Progress))
    assert whole.startswith(told)
    assert "Lily" not in whole


def test_cancelled_and_late_requests_free_their_rows(scheduler: Scheduler) -> None:
    long = GenerationRequest((1, 5, 6), 300)
    jobs = [submit(scheduler, "base", long)[0] for _ in range(12)]
    late = submit(scheduler, "base", long, seconds=0.0)[1]
    assert late.last() == Failed(504, "the request took longer than the server allows")
    for job in jobs:
        job.cancelled = True
    assert submit(scheduler, "base", GenerationRequest((1, 5, 6), 2))[1].finished().generation.tokens <= 2
    assert (scheduler.busy, scheduler.waiting) == (0, 0)


@pytest.mark.parametrize(("patience", "turns"), [(0, 5), (1e6, 2)])
def test_running_answers_advance_between_pieces_of_a_long_prompt(
    story_llama: Path, monkeypatch: pytest.MonkeyPatch, patience: float, turns: int
) -> None:
    """At turns of its own; the patience decides how many pieces of 64 tokens are filled in one."""
    scheduler, _ = prepared(story_llama, {}, "--rows", "2", "--context", "320")
    monkeypatch.setattr(scheduling, "PATIENCE", patience)
    monkeypatch.setattr(scheduling, "LENGTHS", LENGTHS[:1])
    short, long = GenerationRequest((1, 5, 6), 60), GenerationRequest((1,) * 250, 2)
    with jax.set_mesh(scheduler.models.network.mesh):
        for request in (short, long):
            submit(scheduler, "base", request)
        scheduler.turn()
        running, filled = scheduler._rows[0], scheduler._rows[1]
        for turn in range(1, turns):
            assert (filled.filled, len(running.tokens)) == (64 * (turn - 1), 1 + scheduling.STEPS * turn)
            scheduler.turn()
    assert filled.is_filled
    assert len(filled.tokens) == 1 + scheduling.STEPS
    scheduler.stop()


def test_short_prompts_of_one_adapter_are_filled_together(
    story_llama: Path,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    torch: ModuleType,
    transformers: ModuleType,
) -> None:
    scheduler, _ = prepared(story_llama, adapters, "--rows", "16", "--context", "320")
    monkeypatch.setattr(scheduling, "PATIENCE", 1e6)
    monkeypatch.setattr(scheduling, "LENGTHS", LENGTHS)
    filled: list[list[int]] = []
    fill = scheduler._decoder.fill
    monkeypatch.setattr(scheduler._decoder, "fill", lambda parts, n: (filled.append(list(parts)), fill(parts, n))[1])
    rng = np.random.default_rng(0)
    prompts = [(1, *rng.integers(3, 2048, length).tolist()) for length in (19, 5, 30, 2, 11, 24, 8, 3, 17, 200, 230)]
    names = ["base"] * len(prompts)
    names[4] = "small"
    reference = transformers.LlamaForCausalLM.from_pretrained(story_llama, dtype=torch.float32).eval()
    with jax.set_mesh(scheduler.models.network.mesh):
        running = [
            submit(scheduler, name, GenerationRequest(prompt, 6), scored=True)[1]
            for name, prompt in zip(names, prompts, strict=True)
        ]
        while not all(heard.ended.is_set() for heard in running):
            scheduler.turn()
    # Eight short prompts fit into one program; 200 and 230 tokens do not fit into another one.
    assert filled == [[0, 1, 2, 3, 5, 6, 7, 8], [4], [9], [10]]
    for name, prompt, heard in zip(names, prompts, running, strict=True):
        if name == "base":
            inputs = torch.tensor([prompt])
            output = reference.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            new = output[0, len(prompt) :].tolist()
            scores = heard.finished().scores
            assert [score.token for score in scores] == (new[: new.index(2)] if 2 in new else new)
    scheduler.stop()


def test_a_full_queue_refuses(scheduler: Scheduler) -> None:
    jobs = [Job(scheduler.models.offered["base"], GenerationRequest((1,), 1), lambda event: None, 0.0)] * 65
    with pytest.raises(Refused, match="requests wait already"):
        scheduler.submit(jobs)


def test_adapters_come_and_go_while_answers_run(scheduler: Scheduler, story_llama: Path, tmp_path: Path) -> None:
    """A running answer is the same; the new adapter's answer is that of `generate`; its columns are used again."""
    path = make_adapter(tmp_path / "new", story_llama, LoraConfig(rank=1, alpha=2.0), seed=9)
    base = scheduler.models.offered["base"]
    adapter = read_adapter(path, scheduler.models.base.spec.config)
    request = GenerationRequest((1, *range(20, 40)), 30)
    before = submit(scheduler, "large", request)[1].finished().generation
    running = submit(scheduler, "large", request)[1]
    new = dataclasses.replace(base, name="new", adapter=adapter)
    scheduler.change(lambda models: models.with_adapter(new))
    found = submit(scheduler, "new", request)[1].finished().generation
    assert running.finished().generation == before
    assert found == ModelLoader("float32").load(ModelAddress(story_llama, path)).generate([request])[0]
    assert found != before
    scheduler.change(lambda models: models.without("new"))
    assert "new" not in scheduler.models.offered
    assert submit(scheduler, "large", request)[1].finished().generation == before


def test_a_failed_computation_fails_its_requests_only(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory")

    monkeypatch.setattr(scheduler._decoder, "fill", broken)
    failed = submit(scheduler, "base", GenerationRequest((1, 5, 6), 2))[1].last()
    assert isinstance(failed, Failed)
    assert (failed.status, "RESOURCE_EXHAUSTED" in failed.message) == (500, True)
    assert submit(scheduler, "base", GenerationRequest((1, 5, 6), 2))[1].finished().generation.tokens == 2
