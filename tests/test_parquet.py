"""Columns and files in Arrow and parquet that are not as expected: `source` is the reader, of tables or of streams."""

import base64
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from children import closed, files_up_to
from recipes.data import DataError
from shard_cases import number_of, picture
from source_cases import make

SPLITS = ("train", "validation")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(params=["arrow", "parquet"])
def source(request):
    return request.param


def cells(count):
    return [{"bytes": picture(number), "path": None} for number in range(count)]


def write(root, images, kind=None, labels=(0, 1, 2, 0, 1, 2), **options):
    """The same table as both splits."""
    root.mkdir(exist_ok=True)
    table = pa.table({"image": pa.array(images, kind), "label": labels})
    for split in SPLITS:
        pq.write_table(table, root / f"{split}-0.parquet", **options)
    return {"root": str(root)}


def build(root, source="parquet"):
    return make("parquet_stream", root=str(root), source=source)


def test_tables_that_cannot_be_kept(tmp_path, monkeypatch):
    """The data are well: `datasets` cannot write what it makes of them."""
    root, home = write(tmp_path / "data", cells(6))["root"], tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / ".cache" / "huggingface" / "datasets")
    said = rf"^`datasets` cannot keep the tables .* of 'train' in {home}/.*: \[Errno \d+\] {{}}.* Set HF_HOME to a"
    with closed(home, 0o555), pytest.raises(DataError, match=said.format("Permission denied")):
        build(root, "arrow")
    with files_up_to(100), pytest.raises(DataError, match=said.format("File too large")):
        build(root, "arrow")
    assert len(build(root, "arrow").val) == 6
    with closed(tmp_path / "data" / "train-0.parquet"), pytest.raises(DataError, match=r"^cannot read the parquet"):
        build(root, "arrow")


def test_a_user_without_a_home_folder_makes_no_tables(tmp_path, monkeypatch):
    root = write(tmp_path / "data", cells(6))["root"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "~/.cache/huggingface/datasets")
    with pytest.raises(DataError, match=r"below the home folder, and this user has none: set HF_HOME to a folder"):
        build(root, "arrow")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_rows_after_a_broken_page(tmp_path):
    """A page of noise ends pyarrow's iterator: what follows is an error, never the image of another row."""
    noise = np.random.default_rng(0).bytes
    images = [{"bytes": picture(number) + noise(200), "path": None} for number in range(200)]  # Pillow ignores the rest
    options = {"data_page_size": 4096, "write_batch_size": 10, "use_dictionary": False}
    write(tmp_path / "data", images, STRUCT, labels=[0] * 200, row_group_size=150, **options)
    with open(tmp_path / "data" / "train-0.parquet", "r+b") as file:
        file.seek(os.path.getsize(file.name) // 2)
        file.write(b"\xff" * 400)
    records = build(tmp_path / "data").train.records
    failed = {}
    for index in [*range(200), 140, 10, 160, 149, 31]:  # readers of other orders start at the group again
        try:
            assert number_of(records.image(index)) == index
        except DataError as error:
            failed[index] = str(error)
    assert list(failed) == list(range(min(failed), 150)) and 32 <= min(failed) < 140
    causes = {said.partition(f"row {index}: ")[2] for index, said in failed.items()}
    assert len(causes) == 1 and "StopIteration" not in causes and "" not in causes


@pytest.mark.parametrize(
    ("images", "kind", "said"),
    [
        ([{"data": picture(0)}] * 6, None, r"struct<data: binary>"),
        ([[1, 2]] * 6, None, r"list<\w+: int64>"),
        ([[cell] for cell in cells(6)], pa.list_(STRUCT), r"list<\w+: struct<bytes: binary, path: string>>"),
        ([5] * 6, None, "int64"),
    ],
)
def test_columns_of_anything_but_images(tmp_path, source, images, kind, said):
    write(tmp_path / "data", images, kind)
    with pytest.raises(DataError, match=rf"the column 'image' holds {said}: expected .*; set data.image_key="):
        build(tmp_path / "data", source)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])])
def test_columns_of_images(tmp_path, source, kind):
    given = [picture(number) for number in range(6)]
    write(tmp_path / "data", given if kind.num_fields == 0 else [{"bytes": image} for image in given], kind)
    assert number_of(build(tmp_path / "data", source).train.image(4)) == 4


def test_images_as_text(tmp_path, source):
    """Base64 is taken for the name of a file, of which the message has a part."""
    text = base64.b64encode(picture(0) + bytes(9000)).decode()
    write(tmp_path / "data", [text] * 6)
    with pytest.raises(DataError, match=r"row 0,? holds the name of an image, 'iVBOR[^ ]*\.\.\.") as error:
        build(tmp_path / "data", source).train.sample(0, 0)
    assert len(str(error.value)) < 600


def test_labels_that_are_hardly_classes(tmp_path, source):
    """Dates, say: every number below would be a class."""
    write(tmp_path / "data", cells(2), STRUCT, labels=[20221128, 7])
    with pytest.raises(DataError, match=r"would make 20221129 classes: expected .* data\.num_classes="):
        build(tmp_path / "data", source)
    write(tmp_path / "data", cells(2), STRUCT, labels=[2, 7])
    assert build(tmp_path / "data", source).num_classes == 8


def test_classes_without_names_are_those_of_both_splits(tmp_path, source):
    write(tmp_path / "data", cells(6), STRUCT)
    table = pa.table({"image": pa.array(cells(6), STRUCT), "label": [0, 1, 3, 0, 1, 3]})
    pq.write_table(table, tmp_path / "data" / "validation-0.parquet")
    assert build(tmp_path / "data", source).class_names == ["0", "1", "2", "3"]


def test_files_without_rows(tmp_path, source):
    write(tmp_path / "data", cells(6), STRUCT)
    file = tmp_path / "data" / "train-0.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), tmp_path / "data" / "train-1.parquet")
    assert len(build(tmp_path / "data", source).train) == 6
    file.unlink()
    with pytest.raises(DataError, match=r"(is empty|has no rows): expected at least one image"):
        build(tmp_path / "data", source)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"PAR1 but no more", "magic bytes"), (None, "thrift")],
)
def test_the_broken_file_is_named(tmp_path, content, said):
    write(tmp_path / "data", cells(6), STRUCT)
    whole = (tmp_path / "data" / "train-0.parquet").read_bytes()
    file = tmp_path / "data" / "train-1.parquet"
    file.write_bytes(content or whole[:8] + b"\xff" * 300 + whole[308:])
    with pytest.raises(DataError, match=rf"cannot read the parquet file {file}: .*{said}"):
        build(tmp_path / "data", "arrow")


def test_files_that_do_not_fit_together(tmp_path):
    """The reason comes from `datasets`, below its own error."""
    write(tmp_path / "data", cells(6), STRUCT)
    table = pq.read_table(tmp_path / "data" / "train-0.parquet")
    pq.write_table(table.append_column("extra", table["label"]), tmp_path / "data" / "train-1.parquet")
    with pytest.raises(DataError, match=r"parquet files of 'train' under .*because column names don't match"):
        build(tmp_path / "data", "arrow")


def test_features_of_another_version(tmp_path, source):
    """The metadata that `datasets` writes name the kind of each column."""
    write(tmp_path / "data", cells(6), STRUCT)
    file = tmp_path / "data" / "train-0.parquet"
    said = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "Later"}}}}
    table = pq.read_table(file).replace_schema_metadata({"huggingface": json.dumps(said)})
    for place, named in (("train-0", rf"parquet files of 'train'|parquet file {file}"), ("train-1", "train-1.parquet")):
        pq.write_table(table, file.with_stem(place))
        with pytest.raises(DataError, match=rf"cannot read the .*({named}).*: Feature type 'Later' not found"):
            build(tmp_path / "data", source)
        write(tmp_path / "data", cells(6), STRUCT)


def test_a_file_of_two_splits(tmp_path, source):
    write(tmp_path / "data", cells(6), STRUCT)
    (tmp_path / "data" / "train-0.parquet").rename(tmp_path / "data" / "train-validation-0.parquet")
    with pytest.raises(DataError, match=r"train-validation-0.parquet may belong to 'train' and 'validation'"):
        build(tmp_path / "data", source)


def test_saved_splits_that_lack_something(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": cells(6), "label": [0, 1, 2] * 2}, features=features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "named")
    with pytest.raises(DataError, match=r"has no split 'validation', only test, train: set data.train_split= and"):
        build(tmp_path / "named", "arrow")
    table.save_to_disk(tmp_path / "single")
    with pytest.raises(DataError, match=r"is a single data set: expected a folder for each split, train and valid"):
        build(tmp_path / "single", "arrow")
    features["image"] = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    plain = table.cast(features)  # older versions of `datasets` cannot save a split of images without rows
    datasets.DatasetDict({"train": plain, "validation": plain.select([])}).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match=r"split 'validation', under .*empty has no rows: expected at least one image"):
        build(tmp_path / "empty", "arrow")
