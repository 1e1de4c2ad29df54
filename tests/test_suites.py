"""A suite is the same for everybody: its prompts, ids and seeds; and a prompt is only ever text."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rfbench import suites, world
from rfbench.errors import UserError
from rfbench.suites import SUITES, Prompt, Suite, clip_id, clip_seed, load_suite, shard, stratified, suite_sha256

FINE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=200).filter(lambda text: text.strip())


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def lines(path, *values):
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values), encoding="utf-8")
    return str(path)


@given(texts=st.lists(FINE, min_size=1, max_size=8, unique_by=nfc), escaped=st.booleans(), last_newline=st.booleans())
def test_any_text_comes_back_as_it_was_written(tmp_path_factory, texts, escaped, last_newline):
    path = tmp_path_factory.mktemp("suite") / "mine.jsonl"
    body = "\n".join(json.dumps({"text": text, "generate_from": text + "!"}, ensure_ascii=escaped) for text in texts)
    path.write_text(body + "\n" * last_newline, encoding="utf-8", newline="")
    suite = load_suite(str(path))
    assert [(prompt.id, prompt.text, prompt.generate_from) for prompt in suite.prompts] == [(i, text, text + "!") for i, text in enumerate(texts)]
    assert (suite.name, suite.frames, suite.fps, suite.seed, suite.samples) == ("mine", 81, 16, 0, 1)


@given(good=FINE, bad=st.sampled_from(["\n", "\t", "\x00", "\x7f", "\x85", "\u2028", "\u2029", "\ud800"]), at=st.integers(0, 200))
def test_control_characters_and_line_breaks_are_refused_wherever_they_stand(tmp_path_factory, good, bad, at):
    at = min(at, len(good))
    path = lines(tmp_path_factory.mktemp("suite") / "mine.jsonl", {"text": "fine"}, {"text": good[:at] + bad + good[at:]})
    with pytest.raises(UserError, match=rf"line 2: 'text' has a control character or line break \(U\+{ord(bad):04X}\) at position {at}; remove it"):
        load_suite(path)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "there is no prompt in it"),
        ([{"text": ""}], "line 1: 'text' is empty"),
        ([{"text": "\u3000 "}], "line 1: 'text' is empty"),
        ([{"text": "a"}, {"text": "x" * 10_000}], "line 2: 'text' has 10000 characters; the most is 2000"),
        ([{"text": "a", "generate_from": ""}], "line 1: 'generate_from' is empty"),
        ([{"text": "caf\u00e9"}, {"text": "b"}, {"text": "cafe\u0301"}], "line 3: the same prompt as line 1"),
        ([{"txt": "a"}], 'line 1: expected an object with a string "text"'),
        ([{"text": 1}], 'line 1: expected an object with a string "text"'),
        ([["a"]], 'line 1: expected an object with a string "text"'),
        ([{"text": "a", "generate_form": "b"}], "unknown key 'generate_form'; did you mean 'generate_from'"),
        ([{"text": "a"}, "", {"text": "b"}], "line 2: not JSON"),
        (["a red disc"], "line 1: not JSON"),
        (["[" * 100_000], "line 1: not JSON"),
    ],
)
def test_a_suite_that_cannot_be_used_is_refused_with_one_sentence(tmp_path, rows, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_suite(lines(tmp_path / "mine.jsonl", *rows))
    assert "\n" not in str(caught.value) and caught.value.code == 2 and len(str(caught.value)) < 400


def test_hostile_text_is_only_text(tmp_path):
    texts = [
        "../../x",
        "/etc/passwd",
        "a red disc \N{FIRE}\N{ZERO WIDTH JOINER}\N{FIRE}",
        "$(rm -rf ~)",
        "-s",
        "\N{RIGHT-TO-LEFT OVERRIDE}abc",
        "x" * 2000,
    ]
    suite = load_suite(lines(tmp_path / "mine.jsonl", *({"text": text} for text in texts)))
    assert [prompt.text for prompt in suite.prompts] == texts


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match="not UTF-8 at byte 13"):
        load_suite(str(tmp_path / "mine.jsonl"))


def test_a_header_says_how_long_and_how_many(tmp_path):
    lines(tmp_path / "prompts.jsonl", {"text": "a"}, {"text": "b"})
    (tmp_path / "mine.yaml").write_text("prompts: prompts.jsonl\nframes: 33\nfps: 8\nseed: 7\nsamples: 3\n")
    suite = load_suite(str(tmp_path / "mine.yaml"), limit=1)
    assert suite == Suite("mine", 33, 8, 7, 3, (suites.Prompt(0, "a"),))


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("prompts: nowhere.jsonl", r"nowhere\.jsonl: there is no such file"),
        ("prompts: p.jsonl\nframes: 0", "'frames' is 0; the least is 1"),
        ("prompts: p.jsonl\nseed: -1", "'seed' is -1; the least is 0"),
        ("prompts: p.jsonl\nsample: 2", "unknown key 'sample'; did you mean 'samples'"),
        ("prompts: p.jsonl\nfps: fast", "expected int, found 'fast'"),
        ("frames: 81", "'prompts' is missing"),
        ("- a", "expected the keys of SuiteFile"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_header_is_refused_with_one_sentence(tmp_path, header, sentence):
    lines(tmp_path / "p.jsonl", {"text": "a"})
    (tmp_path / "mine.yaml").write_text(header)
    with pytest.raises(UserError, match=sentence) as caught:
        load_suite(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("toy-shrot", "there is no suite 'toy-shrot'; did you mean 'toy-short'"),
        ("nowhere.jsonl", "there is no such file"),
        ("../../x", r"there is no suite '\.\./\.\./x'"),
    ],
)
def test_an_unknown_suite_is_refused(name, sentence):
    with pytest.raises(UserError, match=sentence):
        load_suite(name)


def test_a_file_name_that_is_no_folder_name_is_refused(tmp_path):
    for name in ("a b.jsonl", "-x.jsonl", ".jsonl"):
        with pytest.raises(UserError, match="name the file with letters"):
            load_suite(lines(tmp_path / name, {"text": "a"}))


TOY = [name for name, header in SUITES.items() if header.prompts not in ("vbench", "moviegen")]


@pytest.mark.parametrize("name", TOY)
def test_built_in_prompts_belong_to_the_toy_world(name):
    suite = load_suite(name)
    for prompt in suite.prompts:
        assert str(world.parse(prompt.text)) == prompt.text


def test_toy_suites_are_balanced():
    for name, prompts, changes in (("toy-short", 24, 6), ("toy-long", 12, 0)):
        captions = [world.parse(prompt.text) for prompt in load_suite(name).prompts]
        assert len(captions) == prompts
        assert set(Counter(caption.colour for caption in captions).values()) == {prompts // 6}
        assert set(Counter(caption.shape for caption in captions).values()) == {prompts // 3}
        directions = Counter(caption.direction for caption in captions if caption.direction)
        assert set(directions) == set(world.DIRECTIONS) and max(directions.values()) - min(directions.values()) <= 1
        speeds = Counter(caption.speed for caption in captions if caption.speed)
        assert speeds["slowly"] == speeds["quickly"]
        assert sum(caption.speed is None for caption in captions) > prompts / 2, "open speeds are where a reward can pull"
        assert sum(bool(caption.then_direction or caption.then_speed) for caption in captions) == changes


@pytest.mark.parametrize("name", TOY)
def test_a_limit_keeps_the_first_prompts_and_their_ids(name):
    whole = load_suite(name)
    assert load_suite(name, limit=1).prompts == whole.prompts[:1]
    assert load_suite(name, limit=10_000) == whole
    with pytest.raises(UserError, match="--limit 0 leaves no prompt"):
        load_suite(name, limit=0)


def test_seeds_of_clips_are_far_apart_and_never_change():
    """Changing the rule would change every video that was ever made: the first value is written down."""
    digest = hashlib.sha256(b"0/7/1").hexdigest()
    assert clip_seed(0, 7, 1) == int(digest[:16], 16) // 2 == 4705306923909516265
    seeds = [clip_seed(*key) for key in itertools.product(range(3), range(200), range(5))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


@given(prompt=st.integers(0, 10**6), sample=st.integers(0, 99))
def test_clip_ids_are_file_names_that_say_which_clip(prompt, sample):
    name = clip_id(prompt, sample)
    assert re.fullmatch(r"\d{4,}-\d+", name) and tuple(map(int, name.split("-"))) == (prompt, sample)


@given(items=st.lists(st.integers()), count=st.integers(1, 12))
def test_shards_are_disjoint_cover_all_and_are_even(items, count):
    parts = [shard(items, f"{i}/{count}") for i in range(1, count + 1)]
    assert Counter(itertools.chain.from_iterable(parts)) == Counter(items)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(part=st.text(max_size=8))
def test_a_part_that_is_not_i_of_n_is_refused(part):
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
    assume(not (match and 1 <= int(match[1]) <= int(match[2])))
    with pytest.raises(UserError, match="write I/N"):
        shard([1, 2, 3], part)


def test_identity_knows_everything_but_the_name():
    base = load_suite("smoke")
    shas = {suite_sha256(base)}
    for field, value in (("frames", 81), ("fps", 8), ("seed", 1), ("samples", 9), ("prompts", base.prompts[:1])):
        shas.add(suite_sha256(Suite(**{**vars(base), field: value})))
    assert len(shas) == 6
    assert suite_sha256(Suite(**{**vars(base), "name": "other"})) == suite_sha256(base)


def test_a_share_of_a_suite_has_all_its_strata_and_says_so_in_its_name() -> None:
    kinds = [("scene",)] * 100 + [("color",)] * 10 + [("human_action",)]
    prompts = [Prompt(i, f"prompt {i}", dimensions=kind) for i, kind in enumerate(kinds)]
    kept = stratified(prompts, 0.1)
    assert [sum(prompt.dimensions == (kind,) for prompt in kept) for kind in ("scene", "color", "human_action")] == [10, 1, 1]
    assert [prompt.id for prompt in kept][:3] == [5, 15, 25] and list(kept) == sorted(kept, key=lambda prompt: prompt.id)
    some, whole = load_suite("toy-short@0.25"), load_suite("toy-short")
    assert some.name == "toy-short@0.25" and len(some.prompts) == len(whole.prompts) // 4
    assert set(some.prompts) < set(whole.prompts) and suite_sha256(some) != suite_sha256(whole)
    for wrong in ("toy-short@", "toy-short@2", "toy-short@0", "toy-short@x"):
        with pytest.raises(UserError, match=r"write a share of the prompts between 0 and 1 after the @, for example toy-short@0\.02"):
            load_suite(wrong)


def test_the_first_prompts_of_a_file_can_be_a_suite_and_have_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": f"prompt {i}"}) + "\n" for i in range(5)))
    (tmp_path / "few.yaml").write_text("{prompts: lines.jsonl, first: 3}")
    assert [prompt.id for prompt in load_suite(str(tmp_path / "few.yaml")).prompts] == [0, 1, 2]
    (tmp_path / "few.yaml").write_text("{prompts: lines.jsonl, first: 6}")
    with pytest.raises(UserError, match="asks for the first 6 prompts, and there are 5"):
        load_suite(str(tmp_path / "few.yaml"))


def test_moviegen_is_taken_from_the_published_files_alone(folders: Path) -> None:
    with pytest.raises(UserError, match=r"needs prompts/MovieGenVideoBench\.txt of guandeh17/Self-Forcing; `rfbench fetch` with the suite's name"):
        load_suite("moviegen-60s")
    path = folders / "weights" / "guandeh17" / "Self-Forcing" / "prompts" / "MovieGenVideoBench.txt"
    path.parent.mkdir(parents=True)
    path.write_text("another prompt\n")
    with pytest.raises(UserError, match="is not the published file"):
        load_suite("moviegen-60s")
