"""Every metric that the served model publishes is in the guide, and no other."""

import re
import urllib.request

from tests.conftest import ROOT


def test_the_guide_names_every_metric_with_its_type(served):
    with urllib.request.urlopen(f"http://{served.server.metrics_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    published = dict(re.findall(r"^# TYPE (ngpt_\w+) (\w+)$", text, re.M))
    guide = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(ngpt_\w+)` \| (\w+) \|", guide, re.M)) == published and len(published) >= 10
    labels = re.search(r"^ngpt_slots\{(.*)\}", text, re.M)[1]
    assert all(f'{name}="' in labels for name in ("model", "version", "instance"))
