"""Reads JSON files of the store, which another version may have written in another form."""

import json

from pydantic import BaseModel, ValidationError

from masters.common.errors import ArtifactError, one_line
from masters.config.loading import describe_errors
from masters.store.storage import Storage


def read_json(storage: Storage, name: str, form: type[BaseModel], remedy: str) -> dict:
    """Return the content of a file as it is stored, with the fields that `form` does not name.

    Raises ArtifactError, which ends with `remedy`, if it has not this form; FileNotFoundError if there is no file.
    """
    try:
        content = json.loads(storage.read(name))
        form.model_validate(content)
    except ValueError as error:
        reason = describe_errors(error) if isinstance(error, ValidationError) else one_line(error)
        raise ArtifactError(f"{storage.uri(name)} cannot be read ({reason}): {remedy}") from error
    return content
