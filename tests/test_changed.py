from tests.changed import reaches, select


def test_a_mechanism_brings_its_own_tests():
    files, slugs = select(["attnlab/attention/linear/hedgehog.py"])
    assert slugs == {"hedgehog"}
    assert not any(file.startswith(("tests/golden/", "tests/pallas_kernels/")) for file in files)


def test_a_shared_part_brings_the_mechanisms_that_use_it():
    files, slugs = select(["attnlab/nn/linear_mixer.py"])
    assert {"hedgehog", "tnl", "lightning_attention_2"} <= slugs
    assert "window_attention" not in slugs
    assert all("attnlab/nn/linear_mixer.py" in reaches(file) for file in files if "conformance" in file)


def test_a_kernel_brings_its_tests_and_mechanisms():
    files, slugs = select(["pallas_kernels/neighborhood_attention/xla.py"])
    assert "neighborhood_attention" in slugs
    assert any(file.startswith("tests/pallas_kernels/neighborhood_attention/") for file in files)


def test_a_test_brings_itself():
    assert select(["tests/test_changed.py"]) == (frozenset({"tests/test_changed.py"}), frozenset())


def test_what_all_share_brings_all():
    assert select(["pyproject.toml"]).files == {"tests"}
    assert "tests/conformance/test_mixers.py" in select(["attnlab/contract.py"]).files
    assert "tests/golden/test_golden.py" in select(["tests/golden/cases.py"]).files


def test_texts_and_data():
    assert "tests/test_readme.py" in select(["README.md"]).files
    assert select(["tests/golden/data/tnl/lrpe.npz"]).slugs == {"tnl"}
    assert select(["colab/quickstart.ipynb"]).files == {"tests/colab"}
