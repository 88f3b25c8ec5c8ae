"""The scheme of a URI (RFC 3986, section 3.1), before "://"."""

import re

URI_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
