"""The examples in the docstrings of the public API run, and print what they say."""

import doctest
import inspect

import pytest

import attnimg
from attnimg.integrations.transformers import AttnimgCallback

FINDER = doctest.DocTestFinder(recurse=True)
DOCUMENTED = {name: getattr(attnimg, name) for name in attnimg.__all__}
DOCUMENTED["AttnimgCallback"] = AttnimgCallback
EXAMPLES = [
    test
    for name, found in DOCUMENTED.items()
    for test in FINDER.find(found, name=name)
    if test.examples
]


@pytest.fixture(scope="module")
def kept_proofs(tmp_path_factory):
    """Return a cache of proofs that the examples share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_prints_what_it_says(example, kept_proofs, monkeypatch):
    monkeypatch.setenv("ATTNIMG_CACHE", str(kept_proofs))
    runner = doctest.DocTestRunner()
    report = []
    runner.run(example, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)


def test_every_public_function_has_an_example():
    functions = {name for name in attnimg.__all__ if not inspect.isclass(getattr(attnimg, name))}
    assert functions <= {example.name for example in EXAMPLES}
