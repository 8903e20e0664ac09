"""Scores and generations against transformers, request by request, however they are packed, grouped and refilled."""

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flacuna_jax import compiler
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.data.special_tokens import Special, SpecialTokens
from flacuna_jax.errors import UserError
from flacuna_jax.generation import by_layer, continuation
from flacuna_jax.generation.decoder import Decoder
from flacuna_jax.generation.engine import LlamaLanguageModel, _row_counts
from flacuna_jax.generation.language_model import GenerationRequest, ScoreRequest
from flacuna_jax.generation.prefixes import plan_prefixes
from flacuna_jax.generation.settings import Placement
from flacuna_jax.generation.shared_prefix import compute_prefix
from flacuna_jax.generation.sizes import SIZES, coarse_size, padded_size
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from tests.evaluation.models import story_model
from tests.tiny import SMALL, random_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# float32 on both sides; sums of up to 60 log-probabilities, reduced in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(story_llama: Path) -> "transformers.LlamaForCausalLM":
    return transformers.LlamaForCausalLM.from_pretrained(story_llama, dtype=torch.float32).eval()


def _requests(seed: int, header: int, vocab: int = 2048) -> list[ScoreRequest]:
    """Two subjects with a header each, and other requests."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(3, vocab, n))

    requests = []
    for subject in ((1, *ids(header)), (1, *ids(header // 2))):
        for _ in range(12):
            context = subject + ids(int(rng.integers(1, 40)))
            requests += [ScoreRequest(context, ids(1)) for _ in range(3)]
            requests.append(ScoreRequest(context, ids(int(rng.integers(2, 30)))))
    requests += [ScoreRequest((1, *ids(int(n))), ids(int(m))) for n, m in rng.integers(1, 60, (10, 2))]
    order = rng.permutation(len(requests))
    return [requests[i] for i in order]


def _reference_score(model: "transformers.LlamaForCausalLM", request: ScoreRequest) -> tuple[float, bool]:
    tokens = torch.tensor([request.context + request.continuation])
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens[:, :-1]).logits[0], dim=-1)[len(request.context) - 1 :]
    target = tokens[0, len(request.context) :]
    return float(log_p.gather(1, target[:, None]).sum()), bool((log_p.argmax(1) == target).all())


def test_scores_equal_transformers(story_llama: Path, reference: "transformers.LlamaForCausalLM") -> None:
    """On four devices, with two prefixes, and requests without a shared prefix."""
    requests = _requests(0, 150)
    model = story_model(story_llama, devices=4, row_length=256, row_tokens=1024)
    scores = model.loglikelihood(requests)
    for request, score in zip(requests, scores, strict=True):
        log_probability, is_greedy = _reference_score(reference, request)
        assert score.log_probability == pytest.approx(log_probability, abs=TOLERANCE)
        assert score.is_greedy == is_greedy


def test_greedy_continuations_are_detected(story_llama: Path) -> None:
    model = story_model(story_llama)
    prompt = (1, *model.tokenizer.encode("Once upon a time"))
    scores = model.loglikelihood([ScoreRequest(prompt, (token,)) for token in range(2048)])
    best = int(np.argmax([score.log_probability for score in scores]))
    assert [index for index, score in enumerate(scores) if score.is_greedy] == [best]
    assert np.exp([score.log_probability for score in scores]).sum() == pytest.approx(1, abs=1e-4)


def test_generations_equal_transformers_independent_of_other_requests(
    story_llama: Path, reference: "transformers.LlamaForCausalLM"
) -> None:
    """Twelve requests through four rows, one per device: rows are refilled as answers end."""
    model = story_model(story_llama, devices=4, rows=4)
    rng = np.random.default_rng(1)
    header = (1, *rng.integers(3, 2048, 90).tolist())
    requests = [
        GenerationRequest(
            (header if i % 3 else (1,)) + tuple(rng.integers(3, 2048, 3 + 4 * i).tolist()), 4 + 9 * i % 50
        )
        for i in range(12)
    ]
    ours = model.generate(requests)
    for request, generation in zip(requests, ours, strict=True):
        inputs = torch.tensor([request.prompt])
        output = reference.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=request.max_new_tokens
        )[0, len(request.prompt) :].tolist()
        new = output[: output.index(2)] if 2 in output else output
        assert generation.text == model.tokenizer.decode(new)
        assert generation.tokens == len(new)
        assert generation.finish == ("eos" if 2 in output else "length")


class _Numbers:
    """Text is the ids themselves, so that generations show their tokens."""

    bos_id, eos_id, unk_id, vocab_size = 1, SMALL.vocab_size, None, SMALL.vocab_size + 1
    special, prefix_ids = SpecialTokens({"<s>": Special(1), "</s>": Special(SMALL.vocab_size)}, "<s>", "</s>"), (1,)

    def encode(self, text: str, first: bool = True) -> list[int]:
        return [int(number) for number in text.split()]

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def _small(spec: ModelSpec, mesh: MeshConfig | None = None, **placement: int) -> LlamaLanguageModel:
    """Random weights; its EOS is not a valid token, so that nothing ends early."""
    params = random_params(spec.base_shapes | spec.lora_shapes, 0.2)
    mesh = make_mesh(mesh or MeshConfig())
    params = jax.device_put(params, parameter_shardings(spec.base | spec.adapters, mesh))
    return LlamaLanguageModel(spec, params, _Numbers(), mesh, placement=Placement(**placement))


def _is_greedy(model: LlamaLanguageModel, prompt: Sequence[int], new: list[int]) -> bool:
    """Whether each new token is the most likely one if the whole sequence is run at once, without a cache."""
    ids = jnp.array([[*prompt, *new]])
    network = model.spec.merge(model.params)
    logits_btv = network.logits(network(ids, jnp.arange(ids.shape[1])[None], make_packed_mask(jnp.ones_like(ids))))
    return jnp.argmax(logits_btv[0], -1)[len(prompt) - 1 : -1].tolist() == new


def _prompts(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(3)
    return [tuple(rng.integers(3, SMALL.vocab_size, length).tolist()) for length in lengths]


@pytest.mark.parametrize(("kv_heads", "small_stack"), [(1, by_layer.SMALL_STACK), (4, by_layer.SMALL_STACK), (1, 0)])
def test_the_cache_gives_the_same_as_recomputing_everything(
    kv_heads: int, small_stack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With separate and stacked layers; the last prompt and its answer extend over all blocks of the cache."""
    monkeypatch.setattr(by_layer, "SMALL_STACK", small_stack)
    config = dataclasses.replace(SMALL, num_kv_heads=kv_heads)
    model = _small(ModelSpec(config, None, "float32", "float32"))
    assert (model.network.layers is None) == (small_stack == 0)
    prompts = _prompts([1, 5, 33, 188])
    for prompt, answer in zip(prompts, model.generate([GenerationRequest(p, 20) for p in prompts]), strict=True):
        assert answer.tokens == 20
        assert _is_greedy(model, prompt, model.tokenizer.encode(answer.text))


@pytest.mark.parametrize("layers", [None, pytest.param((1,), marks=pytest.mark.slow)])
def test_a_sliding_window_moves_over_prefix_cache_and_new_tokens(layers: tuple[int, ...] | None) -> None:
    """The window of 24 is in the shared prefix, across its end, or completely after it, and moves while 20 tokens are
    generated; a score after the prefix equals that of the whole text."""
    config = dataclasses.replace(SMALL, sliding_window=24, windowed_layers=layers)
    model = _small(ModelSpec(config, None, "float32", "float32"))
    header, *rests = _prompts([300, 1, 18, 90])
    prompts = [header + rest for rest in rests]
    assert any(group.length == 300 for group in plan_prefixes(prompts, [len(prompt) - 1 for prompt in prompts]))
    for prompt, answer in zip(prompts, model.generate([GenerationRequest(p, 20) for p in prompts]), strict=True):
        assert _is_greedy(model, prompt, model.tokenizer.encode(answer.text))
    requests = [ScoreRequest(prompt, (5, 6, 7)) for prompt in prompts]
    (alone,) = model.loglikelihood(requests[1:2])
    assert model.loglikelihood(requests)[1].log_probability == pytest.approx(alone.log_probability, abs=TOLERANCE)


def test_requests_at_the_limits() -> None:
    """One token more; a prompt as long as the context; fewer prompts than rows; the same prompt several times."""
    config = dataclasses.replace(SMALL, max_position_embeddings=64)
    model = _small(ModelSpec(config, None, "float32", "float32"), rows=8)
    full, short = _prompts([64, 2])
    requests = [GenerationRequest(*asked) for asked in ((full, 1), (full, 5), (full, 1), (short, 1), (short, 17))]
    answers = model.generate(requests)
    assert [answer.tokens for answer in answers] == [1, 5, 1, 1, 17]
    assert answers[0] == answers[2] == model.generate(requests[:1])[0]
    for request, answer in zip(requests, answers, strict=True):
        assert _is_greedy(model, request.prompt, model.tokenizer.encode(answer.text))
    assert model.generate([]) == []
    assert model.loglikelihood([]) == []


def test_heads_and_rows_split_over_devices_give_the_same_answers() -> None:
    """Rows over two devices, heads and caches over two: every token equals that of one device."""
    spec = ModelSpec(SMALL, None, "float32", "float32")
    requests = [GenerationRequest(prompt, 9) for prompt in _prompts([3, 40, 12, 21, 7])]
    split = _small(spec, MeshConfig(fsdp=2, tensor=2), rows=2)
    cache = jax.tree.leaves(Decoder(split.network, 2, 64).rows.blocks)[0]
    assert cache.sharding.shard_shape(cache.shape)[-4:-2] == (1, SMALL.num_kv_heads // 2)
    assert split.network.layers is None  # see `layers_apart`
    assert split.generate(requests) == _small(spec).generate(requests)


def test_separate_layers_are_those_of_the_stack() -> None:
    model = _small(ModelSpec(SMALL, None, "float32", "float32"))
    layers = by_layer.layers_apart(model.spec, model.params)
    assert layers is not None
    stacked = jax.tree.leaves(nnx.state(model.spec.merge(model.params).layers))
    for leaves, stack in zip(zip(*layers, strict=True), stacked, strict=True):
        np.testing.assert_array_equal(np.stack(leaves), stack)


def test_adapters_are_applied() -> None:
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    model = _small(ModelSpec(SMALL, lora, "float32", "float32"))
    (prompt,) = _prompts([7])
    new = model.tokenizer.encode(model.generate([GenerationRequest(prompt, 12)])[0].text)
    assert _is_greedy(model, prompt, new)
    assert not _is_greedy(model, prompt, new[::-1])
    zeroed = {name: jnp.zeros_like(leaf) if "lora_b" in name else leaf for name, leaf in model.params.items()}
    base = dataclasses.replace(model, params=zeroed)
    assert model.tokenizer.encode(base.generate([GenerationRequest(prompt, 12)])[0].text) != new


def test_bfloat16_follows_float32() -> None:
    """Scores with a shared prefix and without, within the error of 8 bits of mantissa; generation runs."""
    models = [_small(ModelSpec(SMALL, None, dtype, dtype)) for dtype in ("float32", "bfloat16")]
    (header, *prompts) = _prompts([300, 4, 9, 2])
    requests = [ScoreRequest(header + prompt, prompt) for prompt in prompts] + [ScoreRequest(p, p) for p in prompts]
    precise, rough = ([score.log_probability for score in model.loglikelihood(requests)] for model in models)
    assert rough == pytest.approx(precise, rel=0.05)
    asked = [GenerationRequest(start + prompt, 6) for start in (header, ()) for prompt in prompts]
    assert all(answer.tokens == 6 for answer in models[1].generate(asked))


def test_similar_lengths_need_no_other_compilation() -> None:
    model = _small(ModelSpec(SMALL, None, "float32", "float32"), rows=2)
    model.generate([GenerationRequest(p, 4) for p in _prompts([3, 9, 20, 31, 7])])
    programs = (continuation.fill, continuation.start, *by_layer.parts_of(model.spec))
    before = [program._cache_size() for program in programs]
    model.generate([GenerationRequest(p, 4) for p in _prompts([4, 4, 50])])
    assert [program._cache_size() for program in programs] == before


def test_programs_are_released_before_the_process_has_too_many_mappings(
    story_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Answers stay the same, and the number of mappings does not grow with the number of sizes."""
    model = story_model(story_llama)
    requests = [GenerationRequest(tuple(range(5, 5 + length)), 4) for length in (3, 70, 140)]
    scores = [ScoreRequest(request.prompt, (7, 8)) for request in requests]
    answers, scored = model.generate(requests), model.loglikelihood(scores)
    held = _mappings()
    allowed = tmp_path / "max_map_count"
    monkeypatch.setattr(compiler, "MAPPINGS_LIMIT", allowed)
    allowed.write_text(str(10 * held))
    assert not compiler.release_programs()
    allowed.write_text("2")
    assert compiler.release_programs()
    assert _mappings() < held
    assert (model.generate(requests), model.loglikelihood(scores)) == (answers, scored)
    assert _mappings() < held


def _mappings() -> int:
    gc.collect()
    return len(compiler.MAPPINGS.read_text().splitlines())


def test_stop_strings_cut_and_free_their_row(story_llama: Path) -> None:
    model = story_model(story_llama)
    prompt = (1, *model.tokenizer.encode("<|start_story|>Once upon a time"))
    whole = model.generate([GenerationRequest(prompt, 40)])[0].text
    stop = whole[12:15]
    cut = model.generate([GenerationRequest(prompt, 40, (stop, "never"))])[0]
    assert (cut.text, cut.finish) == (whole[: whole.index(stop)], "stop")


def test_stops_are_found_as_if_checked_after_every_token() -> None:
    """Text is the ids with spaces between: a stop of parts of three tokens, and a stop within a longer one."""
    model = _small(ModelSpec(SMALL, None, "float32", "float32"))
    (prompt,) = _prompts([5])
    ids = model.tokenizer.encode(model.generate([GenerationRequest(prompt, 40)])[0].text)
    text = model.tokenizer.decode(ids)
    parts = f"{ids[4]} {ids[5]} {ids[6]}"
    across = model.generate([GenerationRequest(prompt, 40, (parts[1:],))])[0]
    at = text.index(parts[1:])
    assert (across.text, across.finish) == (text[:at], "stop")
    assert across.tokens == len(text[: at + len(parts[1:])].split())
    long = f"{ids[0]} {' '.join(map(str, ids[1:30]))}"  # begins before the other, ends long after it
    assert model.generate([GenerationRequest(prompt, 40, (long, f" {ids[1]}"))])[0].tokens == 2
    assert "".join(model.stream(GenerationRequest(prompt, 40, (parts[1:],)))) == across.text


def test_sampling_depends_only_on_seed_and_prompt(story_llama: Path) -> None:
    model = story_model(story_llama, rows=4)
    prompts = [
        (1, *model.tokenizer.encode(text)) for text in ("One day", "The big dog", "A girl", "In the park he", "x")
    ]
    requests = [GenerationRequest(prompt, 12, temperature=1.0, top_k=50, seed=7) for prompt in prompts]
    together = model.generate(requests)
    assert together == [model.generate([request])[0] for request in requests]
    other = model.generate([GenerationRequest(prompts[0], 12, temperature=1.0, top_k=50, seed=8)])[0]
    assert other != together[0]


def test_rows_are_gathered_as_answers_end(story_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    advance = Decoder.advance

    def counted(self: Decoder, *arguments: Any) -> Any:
        counts.append(len(self.rows.token_b))
        return advance(self, *arguments)

    monkeypatch.setattr(Decoder, "advance", counted)
    model = story_model(story_llama, rows=8)
    words = ("One day", "The big dog", "A girl", "In the park he", "x", "They", "Tom saw", "It was")
    lengths = (64, 5, 9, 60, 7, 8, 20, 6)
    requests = [
        GenerationRequest((1, *model.tokenizer.encode(text)), length, temperature=number % 2, seed=7)
        for number, (text, length) in enumerate(zip(words, lengths, strict=True))
    ]
    together = model.generate(requests)
    assert sorted(set(counts), reverse=True) == [8, 4, 2]
    assert together == [model.generate([request])[0] for request in requests]


@pytest.mark.parametrize(("rows", "counts"), [(1, [1]), (8, [1, 2, 4, 8]), (32, [1, 2, 4, 8, 12, 16, 24, 32])])
def test_numbers_of_rows_that_programs_are_compiled_for(rows: int, counts: list[int]) -> None:
    assert _row_counts(rows) == counts


def test_requests_that_do_not_fit_are_errors(story_llama: Path) -> None:
    model = story_model(story_llama)
    with pytest.raises(UserError, match=r"prompt 1 has 513 tokens; the model's context is 512"):
        model.generate([GenerationRequest((5,) * 513, 3)])
    with pytest.raises(UserError, match="prompt 2 has the token id 99999, but the model's tables have"):
        model.generate([GenerationRequest((5,), 3), GenerationRequest((5, 99999), 3)])
    with pytest.raises(UserError, match="score request 1 has the token id 99999"):
        model.loglikelihood([ScoreRequest((1,), (99999,))])
    with pytest.raises(UserError, match="score request 2 has 600 tokens"):
        model.loglikelihood([ScoreRequest((1,), (5,)), ScoreRequest((1,), (5,) * 600)])
    with pytest.raises(UserError, match="no continuation"):
        model.loglikelihood([ScoreRequest((1,), ())])


def test_prefixes_group_sequences_that_share_and_cover_all() -> None:
    a, b = list(range(1000, 1400)), list(range(2000, 2600))
    sequences = [a + [i] for i in range(5)] + [b + [i, i] for i in range(5)] + [[7, 8, 9]]
    groups = plan_prefixes(sequences, [len(s) - 1 for s in sequences])
    assert sorted(i for group in groups for i in group.members) == list(range(11))
    assert sorted((group.length, group.members) for group in groups if group.length) == [
        (400, (0, 1, 2, 3, 4)),
        (600, (5, 6, 7, 8, 9)),
    ]


def test_prefix_never_takes_a_scored_position() -> None:
    sequences = [[5] * 1000] * 3
    groups = plan_prefixes(sequences, [1000, 700, 900])
    assert [(group.length, len(group.members)) for group in groups] == [(700, 3)]


def test_padded_sizes_waste_at_most_a_quarter_and_coarse_ones_half() -> None:
    for needed in range(200, 5000):
        assert needed <= padded_size(needed) <= max(1.25 * needed, needed + 64)
        assert needed <= coarse_size(needed) <= max(1.5 * needed, needed + 64)
    assert (padded_size(1), padded_size(65), coarse_size(1), coarse_size(129)) == (64, 128, 64, 256)
    assert padded_size(SIZES[-1]) == SIZES[-1]


def test_groups_of_prompts_share_programs() -> None:
    """Prefixes and numbers of prompts that differ a little have the same sizes, as in five-shot MMLU."""
    model = _small(ModelSpec(SMALL, None, "float32", "float32"), rows=16)

    def group(shared: int, members: int) -> list[GenerationRequest]:
        begin = tuple(range(shared))
        return [GenerationRequest((*(n % 90 + 5 for n in begin), 5 + member), 2) for member in range(members)]

    model.generate(group(260, 9))
    programs = (compute_prefix, continuation.fill, continuation.start, *by_layer.parts_of(model.spec))
    before = [program._cache_size() for program in programs]
    for shared, members in ((300, 10), (340, 13), (384, 16)):
        model.generate(group(shared, members))
    assert [program._cache_size() for program in programs] == before
