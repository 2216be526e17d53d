"""The layouts of MovieLens, Amazon Reviews and Yelp, with their quirks."""

import gzip
import json

import pytest

from recsys.assets import ML100K_INTERACTIONS, ML100K_ITEMS
from recsys.data import AmazonReviews, Columns, Filters, MovieLens, MovieLens100K, Yelp
from recsys.data.sources import movielens
from recsys.types import UserError


def write_json(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def rows(tables):
    names = [Columns.USER, Columns.ITEM, Columns.TIME, Columns.RATING]
    return tables.interactions[names].to_numpy().tolist()


def items(tables):
    return tables.items[[Columns.ITEM, Columns.TITLE, Columns.CATEGORY]].to_numpy().tolist()


# -------------------------------------------------------------------------------------------- MovieLens


def test_movielens_100k_from_the_index(tmp_path, monkeypatch):
    """Quotes are part of a title there, and the headers carry types."""
    log, films = tmp_path / "ml-100k.inter", tmp_path / "ml-100k.item"
    log.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t2\t3\t881250949\n22\t1\t2\t5\n")
    films.write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '1\t"Toy" Story\t1995\tAnimation Children\'s\n2\tGoldenEye\t1995\tAction\n'
    )
    asked = []
    monkeypatch.setattr(movielens, "fetch_all", lambda *args: asked.append(args) or [log, films])
    tables = MovieLens100K(str(tmp_path)).load()
    assert asked == [([ML100K_INTERACTIONS, ML100K_ITEMS], str(tmp_path))]
    assert rows(tables) == [["196", "2", 881250949, 3], ["22", "1", 5, 2]]
    assert items(tables) == [["1", '"Toy" Story', "Animation|Children's"], ["2", "GoldenEye", "Action"]]
    assert len(MovieLens100K(str(tmp_path), Filters(min_rating=3)).load().interactions) == 1


def load(folder, **kwargs):
    return MovieLens(str(folder), cache_dir=str(folder / "cache"), **kwargs).load()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])  # of 1M and of 10M
def test_movielens_dat(tmp_path, encoding):
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::0661::3.5::978302109\n")
    films = (
        "0661::Léon: The Professional (a.k.a. Léon) (1994)::Crime|Drama\n1193::One, Two: 'Three' \"4\" (1975)::War\n"
    )
    (tmp_path / "movies.dat").write_text(films, encoding=encoding)
    tables = load(tmp_path)
    assert rows(tables) == [["1", "1193", 978300760, 5], ["1", "0661", 978302109, 3.5]]
    assert items(tables) == [line.split("::") for line in films.splitlines()]
    assert load(tmp_path, filters=Filters(min_rating=4)).dropped == {"rows_below_min_rating": 1}


def test_movielens_csv(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n")
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n1,Toy Story (1995),Adventure|Animation\n2,"Misérables, ""Les"" (1995)",'
        "(no genres listed)\n",
        encoding="utf-8",
    )
    tables = load(tmp_path)
    assert rows(tables) == [["1", "2", 1112486027, 3.5]]
    assert items(tables) == [["1", "Toy Story (1995)", "Adventure|Animation"], ["2", 'Misérables, "Les" (1995)', ""]]


def test_movielens_100k_folder(tmp_path):
    (tmp_path / "u.data").write_text("196\t2\t3\t881250949\n")
    flags = ["0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0", "1" + "|0" * 18]
    films = f'1|Señor "Toy" (1995)|01-Jan-1995||http://x?a,b|{flags[0]}\n2|unknown||||{flags[1]}\n'
    (tmp_path / "u.item").write_text(films, encoding="latin-1")
    tables = load(tmp_path)
    assert rows(tables) == [["196", "2", 881250949, 3]]
    assert items(tables) == [["1", 'Señor "Toy" (1995)', "Animation|Children's|Comedy"], ["2", "unknown", ""]]


def test_movielens_folders_that_are_not_whole(tmp_path):
    with pytest.raises(UserError, match=r"has no ratings\.csv, ratings\.dat or u\.data"):
        load(tmp_path)
    (tmp_path / "ratings.dat").write_text("1::2::3::4\n1::2::3\n")
    with pytest.raises(UserError, match=r"movies\.dat: no such file"):
        load(tmp_path)
    (tmp_path / "movies.dat").write_text("2::Heat (1995)::Crime\n")
    with pytest.raises(UserError, match=r"ratings\.dat: not readable as a table: line 2 has 3 fields instead of 4"):
        load(tmp_path)


# ----------------------------------------------------------------------------------------------- Amazon

META_2018 = [
    {"asin": "B1", "title": "Nuts &amp; Bolts, 3&#39;\n long", "category": ["Tools &amp; Home", "Nuts"], "price": "$1"},
    {"asin": "B1", "title": "Repeated", "category": []},
    {"asin": "B2", "title": "", "category": []},
    {"title": "Without an id", "category": []},
    {"asin": "B3", "category": []},
    {"asin": "B4", "title": "var aPageStart = (new Date()).getTime();", "category": []},
    {"asin": "B5", "title": '<span class="a-size-medium">Foo</span>', "category": []},
    {"asin": "B6", "title": "Never bought", "category": []},
    {"asin": "B7", "title": ["A title", "in a list"], "category": ["x"], "details": {"any": {"thing": [1]}}},
    {"asin": "B8", "title": "Cable <3 m, A > B", "category": []},
]


def review_2018(user, item, time, rating, **more):
    return {"overall": rating, "reviewerID": user, "asin": item, "unixReviewTime": time, "reviewText": "a\n,b"} | more


def amazon(tmp_path, reviews, metadata, **kwargs):
    return AmazonReviews(reviews, metadata, cache_dir=str(tmp_path / "cache"), **kwargs)


def test_amazon_2018(tmp_path):
    log = [
        review_2018("u1", "B1", 100, 5.0),
        review_2018("u1", "B1", 100, 4.0, style={"Size:": " M"}),  # a duplicate
        review_2018("u1", "B1", 99, 3.0),
        review_2018("u2", "B2", 100, 5.0),
        review_2018("u2", "B4", 100, 5.0, vote="2"),
        review_2018("u2", "B7", 99, 1.0),
        review_2018("u2", "B8", 99, 1.0),
        review_2018("u2", "unknown", 99, 1.0),
    ]
    paths = write_json(tmp_path / "X_5.json.gz", log), write_json(tmp_path / "meta_X.json.gz", META_2018)
    tables = amazon(tmp_path, *paths).load()
    assert rows(tables) == [["u1", "B1", 99, 3], ["u2", "B7", 99, 1], ["u2", "B8", 99, 1]]
    assert items(tables) == [
        ["B1", "Nuts & Bolts, 3' long", "Tools & Home|Nuts"],
        ["B7", "A title|in a list", "x"],
        ["B8", "Cable <3 m, A > B", ""],
    ]
    assert tables.dropped == {
        "items_without_id": 1,
        "items_repeated": 1,
        "items_without_title": 2,
        "items_with_markup": 2,
        "rows_without_item": 3,
        "items_without_rows": 1,
        "rows_duplicate": 2,
    }
    assert tables.interactions.index.tolist() == [3, 6, 7]
    filtered = amazon(tmp_path, *paths, filters=Filters(min_rating=4)).load()
    assert rows(filtered) == [["u1", "B1", 100, 5]]  # the first with that rating
    assert filtered.dropped["rows_duplicate"] == 1
    assert filtered.dropped["rows_below_min_rating"] == 3


@pytest.mark.parametrize(
    ("title", "usable"),
    [
        ("var obj = 1;", False),
        ("(new Date()).getTime()", False),
        ("<span", False),
        ("cut <img src=", False),
        ("&lt;b>Bold&lt;/b>", False),
        ("<br />", False),
        ("Variety pack <3", True),
        ("Size <b", True),
        ("Grove variance", True),
    ],
)
def test_titles_that_are_markup(tmp_path, title, usable):
    metadata = [{"asin": name, "title": text, "category": []} for name, text in (("B1", title), ("B2", "Bolt"))]
    log = [review_2018("u", name, 1, 1) for name in ("B1", "B2")]
    paths = write_json(tmp_path / "log.json", log), write_json(tmp_path / "meta.json", metadata)
    tables = amazon(tmp_path, *paths).load()
    assert tables.dropped["items_with_markup"] == (not usable)
    assert len(tables.items) == 1 + usable


def test_amazon_2023(tmp_path):
    metadata = [
        {"main_category": "Tools", "title": "x" * 3000, "parent_asin": "P1", "categories": ["Tools", "Nuts"]},
        {"main_category": None, "title": None, "parent_asin": "P2", "categories": []},
    ]
    log = [
        {"rating": 5.0, "title": "!", "asin": "C1", "parent_asin": "P1", "user_id": "u1", "timestamp": 1588687728923},
        {"rating": 4.0, "title": "?", "asin": "C2", "parent_asin": "P2", "user_id": "u1", "timestamp": 1588687728924},
    ]
    reviews = write_json(tmp_path / "X.jsonl", log)
    tables = amazon(tmp_path, reviews, write_json(tmp_path / "meta_X.jsonl.gz", metadata)).load()
    assert rows(tables) == [["u1", "P1", 1588687728923, 5]]
    assert items(tables) == [["P1", "x" * 3000, "Tools|Nuts"]]
    (tmp_path / "X.csv").write_text("user_id,parent_asin,rating,timestamp,history\nu1,P1,5.0,1588687728923,A B\n")
    again = amazon(tmp_path, str(tmp_path / "X.csv"), str(tmp_path / "meta_X.jsonl.gz")).load()
    assert rows(again) == rows(tables)


def test_amazon_files_of_neither_layout(tmp_path):
    paths = write_json(tmp_path / "a.json", META_2018), write_json(tmp_path / "b.json", META_2018)
    with pytest.raises(UserError, match=r"a\.json: should have the columns reviewerID, .* or user_id, .*it has asin"):
        amazon(tmp_path, *paths).load()


# ------------------------------------------------------------------------------------------------- Yelp


def test_yelp(tmp_path):
    write_json(
        tmp_path / "yelp_academic_dataset_business.json",
        [
            {"business_id": "b1", "name": "Starbucks", "city": "Reno", "categories": "Coffee & Tea, Food"},
            {"business_id": "b2", "name": "Starbucks", "city": "Tampa", "categories": None},
            {"business_id": "b3", "name": "", "city": "Tampa", "categories": "Food"},
        ],
    )
    write_json(
        tmp_path / "yelp_academic_dataset_review.json",
        [
            {"user_id": "u1", "business_id": "b1", "stars": 3.0, "date": "2018-07-07 22:09:11", "text": "a\nb"},
            {"user_id": "u1", "business_id": "b2", "stars": 5.0, "date": "2018-07-07 22:09:10"},
            {"user_id": "u1", "business_id": "b3", "stars": 5.0, "date": "2018-07-07 22:09:10"},
        ],
    )
    tables = Yelp(str(tmp_path), cache_dir=str(tmp_path / "cache")).load()
    times = [1531001351000000, 1531001350000000]
    assert rows(tables) == [["u1", "b1", times[0], 3], ["u1", "b2", times[1], 5]]
    assert items(tables) == [["b1", "Starbucks", "Coffee & Tea|Food"], ["b2", "Starbucks", ""]]
    assert {name: n for name, n in tables.dropped.items() if n} == {"items_without_title": 1, "rows_without_item": 1}
