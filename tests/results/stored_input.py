"""The small input that tests/results/stored/ was written from, by the code of November 2026."""

import numpy as np

NUM = 60
_generator = np.random.default_rng(14)
_kind = _generator.integers(0, 4, NUM)  # IM, NORMAL2, bacteria, virus
LABELS = (_kind >= 2).astype(np.uint8)
LOGITS = np.round(2.2 * LABELS - 0.8 + _generator.normal(0, 1.6, NUM), 3)
ATYPICALITY = np.round(_generator.random(NUM) * 1.15, 3)
ATYPICALITY[7] = np.nan
PATIENTS = [
    f"{('IM', 'NORMAL2', 'bacteria', 'virus')[kind]}:{row // 2}" for row, kind in enumerate(_kind)
]
SUBTYPES = [("", "", "bacterial", "viral")[kind] for kind in _kind]
SOURCES = [f"test/{row:02d}.png" if row else "=1+1.png" for row in range(NUM)]
GEOMETRY = np.round(_generator.random((NUM, 4)), 3)
BORDER = np.round(_generator.random((NUM, 104)) + LABELS[:, None] / 9, 3)
TEMPERATURE, THRESHOLD = 1.25, 0.4321
