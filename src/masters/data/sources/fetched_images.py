"""A source whose rows name images by URL (`data.fetch_images`): the images are downloaded and become bytes."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from masters.common.hashing import canonical_json, digest
from masters.data.image_downloads import DownloadError, ImageDownloads
from masters.data.sources.base import RawRow, Source
from masters.data.sources.image_references import is_web_url, shown

BATCH_ROWS = 64  # whose images are downloaded at the same time


class FetchedImages:
    """Another source with its images from the web. Images that cannot be downloaded give faulty rows."""

    def __init__(self, source: Source) -> None:
        self._source, self._downloads = source, ImageDownloads()

    def digest(self) -> str:
        """Return the digest of the other source and of every image that was downloaded.

        So an image that has changed is other data, once it is downloaded again, and a source without URLs has the
        digest that it has without this class.
        """
        images = {
            str(named.image): digest(row.image) if isinstance(row.image, bytes) else "none"
            for named, row in self._pairs()
            if is_web_url(named.image)
        }
        own = self._source.digest()
        # half a surrogate pair may be in a URL
        return digest(canonical_json([own, images]).encode(errors="surrogatepass")) if images else own

    def rows(self) -> Iterator[RawRow]:
        return (row for _, row in self._pairs())

    def _pairs(self) -> Iterator[tuple[RawRow, RawRow]]:
        """Yield each row as the other source has it, and with the image's bytes."""
        rows = self._source.rows()
        while batch := list(islice(rows, BATCH_ROWS)):
            self._downloads.fetch(str(row.image) for row in batch if is_web_url(row.image))
            yield from zip(batch, map(self._with_bytes, batch), strict=True)

    def _with_bytes(self, row: RawRow) -> RawRow:
        if not is_web_url(row.image):
            return row
        try:
            return replace(row, image=self._downloads.read(str(row.image)))
        except DownloadError as error:
            return replace(row, image=None, fault=f"image cannot be downloaded ({shown(str(row.image))}: {error})")
