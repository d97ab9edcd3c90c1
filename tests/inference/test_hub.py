"""`push`, and back by `--adapter hf:owner/name`: real commands against a hub on loopback (tests/hub_server.py)."""

import json
import shlex

import pytest
from safetensors.torch import load_file

from tests.conftest import picture
from tests.forks import Forks
from tests.hub_server import TOKEN, Hub, Repository
from tests.inference.test_export import make_adapter
from vlm_lora.config import TrainConfig
from vlm_lora.errors import AdapterError
from vlm_lora.inference.card import without_paths, write_card
from vlm_lora.inference.export import merge
from vlm_lora.inference.hub import uploads


@pytest.fixture(scope="module")
def server():
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def forks(server, tmp_path_factory):
    """With the server in the hub's place, which its library takes from the environment when it is imported."""
    env = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    made = Forks(env | {"HF_HOME": str(tmp_path_factory.mktemp("hf"))})
    yield made
    made.close()


@pytest.fixture
def hub(server):
    server.repositories.clear(), server.store.clear(), server.requests.clear()
    return server


@pytest.fixture
def command(hub, forks, tmp_path):
    """Runs vlm-lora, as (exit code, stdout, stderr)."""

    def run(*arguments, token=TOKEN):
        env = {"VLM_LORA_CACHE": str(tmp_path / "cache")} | ({"HF_TOKEN": token} if token else {})
        (ended,) = forks.run(1, *arguments, env=env)
        assert "Traceback" not in ended.err, ended.err
        return ended.code, ended.out, ended.err

    return run


def make_run(folder, model="tiny", **settings):
    """A run folder with adapter and card; and beside them what must not go up."""
    folder.mkdir(parents=True)
    make_adapter(model, folder / "adapter", by=0.15, rank=4, **settings)
    (folder / "adapter/notes.txt").write_text("secret")
    (folder / "metrics.jsonl").write_text("{}\n")
    command = ["vlm-lora", "train", str(folder / "my pets"), f"--output={folder}", "--prompt", "a/b or c"]
    write_card(
        folder / "adapter", TrainConfig(data=str(folder / "pets")), counts="3 images", fingerprint="f" * 64,
        command=shlex.join(command), scores=None, template_options={},
    )  # fmt: skip
    return folder


def test_an_adapter_goes_up_and_comes_back(hub, command, tmp_path):
    run = make_run(tmp_path / "home/ann/runs/pets")
    picture(3).save(tmp_path / "cat.png")
    code, out, err = command("push", run, "me/pets", "--dry-run")
    assert (code, out, hub.requests) == (0, "", [])
    assert [line.split()[1] for line in err.splitlines()[1:]] == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "contract.json",
    ]  # fmt: skip
    code, out, told = command("push", run, "me/pets")
    assert (code, out) == (0, f"{hub.url}/me/pets\n")
    assert told == err, "what goes up is what was listed"
    assert "private" in told
    repository = hub.repositories["me/pets"]
    assert repository.private
    assert repository.commits == 1
    assert len(hub.store) == 1, "the weights went to the large-file store"
    assert {name.split()[0] for name in repository.files} == {line.split()[1] for line in err.splitlines()[1:]}
    for name, data in repository.files.items():
        assert b"/home/" not in data, name
        assert str(tmp_path).encode() not in data, name
    card = repository.files["README.md"].decode()
    assert "vlm-lora train 'my pets' --output=pets --prompt 'a/b or c'" in card
    assert 'Captioner.load(adapter="me/pets")' in card
    assert "base_model: tiny" not in card

    wanted = command("caption", tmp_path / "cat.png", "--adapter", run, "--max-new-tokens", "8")
    base = command("caption", tmp_path / "cat.png", "--max-new-tokens", "8", "--model", "tiny")
    again = command("caption", tmp_path / "cat.png", "--adapter", "hf:me/pets", "--max-new-tokens", "8")
    assert again[:2] == wanted[:2]
    assert wanted[1] != base[1]
    code, _, err = command("caption", tmp_path / "cat.png", "--adapter", "hf:me/other", token=None)
    assert code == 1
    assert "the model hub has no repository of this name that you may see" in err


def test_a_merged_checkpoint_goes_up_by_both_commands(hub, command, tmp_path, checkpoints):
    run = make_run(tmp_path / "run", model=checkpoints["qwen2_vl"])
    code, out, err = command("merge", run, tmp_path / "merged", "--push", "me/merged")
    assert (code, out) == (0, f"{tmp_path / 'merged'}\n{hub.url}/me/merged\n")
    files = hub.repositories["me/merged"].files
    wanted = {"README.md", "config.json", "contract.json", "chat_template.jinja", "model.safetensors", "tokenizer.json"}
    assert wanted <= files.keys()
    assert "model.safetensors" in err
    for name, data in files.items():
        assert str(tmp_path).encode() not in data, name
        assert str(checkpoints["qwen2_vl"]).encode() not in data, name
    code, _, err = command("push", tmp_path / "merged", "me/again", "--public")
    assert code == 0
    assert "anybody can read" in err
    assert {name for name, data in hub.repositories["me/again"].files.items() if files[name] != data} == {"README.md"}
    assert not hub.repositories["me/again"].private


def test_the_base_of_this_machine_is_named_by_its_last_name(command, hub, tmp_path, checkpoints):
    run = make_run(tmp_path / "run", model=checkpoints["qwen2_vl"])
    code, _, err = command("push", run, "me/pets")
    assert code == 0
    assert "Its base 'qwen2_vl' is a folder of this machine" in err
    files = hub.repositories["me/pets"].files
    assert json.loads(files["contract.json"])["base"] == "qwen2_vl"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "qwen2_vl"
    assert json.loads((run / "adapter/contract.json").read_text())["base"] == str(checkpoints["qwen2_vl"])
    picture(3).save(tmp_path / "cat.png")
    caption = ["caption", tmp_path / "cat.png", "--adapter", "hf:me/pets", "--max-new-tokens", "4"]
    code, _, err = command(*caption)
    assert code == 1
    assert "--model qwen2_vl: there is no such folder" in err
    assert command(*caption, "--model", checkpoints["qwen2_vl"])[0] == 0


def test_what_the_hub_refuses_is_one_line(command, hub, tmp_path):
    run = make_run(tmp_path / "run")
    for name, token, told in [
        ("me/pets", "hf_another", "Invalid username"),
        ("no such name", TOKEN, "no such name"),
    ]:
        code, out, err = command("push", run, name, token=token)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith(f"vlm-lora: {name}: cannot be uploaded: ")
        assert told in err.splitlines()[-1]
    hub.repositories["me/open"] = Repository(private=False, files={"mine.txt": b"precious"})
    code, _, err = command("push", run, "me/open")
    assert code == 2
    assert "anybody can read it" in err
    assert hub.repositories["me/open"].files == {"mine.txt": b"precious"}
    assert command("push", run, "me/open", "--public")[0] == 0
    assert {"mine.txt", "contract.json"} <= hub.repositories["me/open"].files.keys()


def test_what_is_nothing_to_upload(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(AdapterError, match="nothing to upload"):
            uploads(folder, "me/pets")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("from /home/ann/pets/1.png.", "from 1.png."),
        ("`--output=/data/x/run` ", "`--output=run` "),
        ("~/photos/cats and ../up/one and ~ann/x/y", "cats and one and y"),
        ("https://host.org/a/b and host.org/a/b and runs/pets and 3/4 and/or /", None),
        ("<!-- end --> </b> 1 / 2", None),
    ],
)
def test_paths_that_tell_about_the_machine(text, wanted):
    assert without_paths(text) == (wanted or text)


def test_a_merged_model_is_asked_what_it_was_trained_with(tmp_path, checkpoints):
    from vlm_lora.inference.captioner import Captioner

    adapter = make_adapter(checkpoints["qwen2_vl"], tmp_path / "adapter", rank=4, prompt="Which sign?")
    merge(adapter, tmp_path / "merged")
    assert Captioner.load(str(tmp_path / "merged")).prompt == "Which sign?"
    assert Captioner.load(str(tmp_path / "merged"), prompt="Other?").prompt == "Other?"
    assert load_file(tmp_path / "merged/model.safetensors")
    assert "Which sign?" in (tmp_path / "merged/README.md").read_text()
