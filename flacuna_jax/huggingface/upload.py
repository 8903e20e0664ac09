"""Uploads an exported directory to the Hugging Face Hub."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from flacuna_jax.errors import UserError
from flacuna_jax.hub import HubName, explained, import_client

_REPLACED = ("model*.safetensors", "model.safetensors.index.json")
"""Weights of an earlier upload: files of another number of shards would be read instead of the new ones."""


@dataclass(frozen=True)
class Upload:
    """An upload whose token is valid.

    Attributes:
      target: repository, with its owner, and branch.
      public: whether the repository is public if it does not exist yet.
    """

    target: HubName
    public: bool
    client: ModuleType

    def send(self, directory: Path) -> str:
        """Uploads the files of a directory in one commit, creates the repository and the branch if they do not exist,
        and returns the address.

        Raises:
          UserError: the Hub cannot be reached or does not accept the upload. The directory stays.
        """
        api, target = self.client.HfApi(), self.target
        try:
            api.create_repo(target.name, private=not self.public, exist_ok=True)
            if target.revision is not None:
                api.create_branch(target.name, branch=target.revision, exist_ok=True)
            api.upload_folder(
                repo_id=target.name,
                folder_path=str(directory),
                revision=target.revision,
                commit_message="Upload with flacuna_jax",
                delete_patterns=list(_REPLACED) if (directory / "config.json").is_file() else None,
            )
        except Exception as error:
            # The client raises its own errors, those of its HTTP library and of the file system.
            raise UserError(
                f"--push {target.name}: {explained(self.client, error, target, 'model')}. {directory} is complete; to "
                f"upload it later: {self._command(directory)}"
            ) from error
        return f"{self.client.constants.ENDPOINT}/{target.name}/tree/{target.revision or 'main'}"

    def _command(self, directory: Path) -> str:
        command = f"hf upload {self.target.name} {shlex.quote(str(directory))} ."
        command += f" --revision {self.target.revision}" if self.target.revision else ""
        return command + ("" if self.public else " --private")


def prepare_upload(name: str, *, public: bool = False) -> Upload:
    """Checks the name and the token, before any long work.

    Args:
      name: NAME[@BRANCH]; a NAME without an owner belongs to the owner of the token.
      public: whether the repository is public if it does not exist yet.

    Raises:
      UserError: the name is not valid, there is no token, or the Hub refuses it.
    """
    target = HubName.parse(name, "--push NAME[@BRANCH]")
    client = import_client(f"--push {name}")
    try:
        user = client.HfApi().whoami()
    except client.errors.LocalTokenNotFoundError:
        raise UserError(
            f"--push {name}: there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN to a token "
            "with permission to write"
        ) from None
    except Exception as error:
        raise UserError(f"--push {name}: {explained(client, error, target, 'model')}") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push {name}: the token can only read; set HF_TOKEN to one with permission to write")
    owned = target.name if "/" in target.name else f"{user['name']}/{target.name}"
    return Upload(HubName(owned, target.revision), public, client)
