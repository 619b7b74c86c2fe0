"""What pyproject.toml says of libraries agrees with what the code says and with what `make matrix` installs."""

from ngpt.registration import OLDEST_TRANSFORMERS
from scripts.matrix import LIBRARIES, lowest, pinned_torch, requirement


def test_the_lowest_transformers_is_the_one_that_the_code_refuses_to_go_below():
    assert lowest("transformers") == "transformers==" + ".".join(map(str, OLDEST_TRANSFORMERS)) + ".*"


def test_the_matrix_finds_its_libraries_and_their_bounds():
    for library in LIBRARIES:
        assert requirement(library).startswith(f"{library}>=") and lowest(library).startswith(f"{library}==")
    assert "gpu" not in requirement("onnxruntime")
    assert pinned_torch().startswith("torch==")
