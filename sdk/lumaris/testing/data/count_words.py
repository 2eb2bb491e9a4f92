"""Counts the words of one part of a text: the job that the demo sells."""

import json
import re
import sys
from collections import Counter

with open(sys.argv[1], encoding="utf-8", errors="replace") as source:
    counts = Counter(re.findall(r"[a-z']+", source.read().lower()))
with open("/out/counts.json", "w", encoding="utf-8") as target:
    json.dump(counts, target)
print(f"{sum(counts.values())} words, {len(counts)} different")
