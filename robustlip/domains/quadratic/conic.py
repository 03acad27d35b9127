"""LipSDP by cvxpy and one of its solvers, for comparison. Optional: pip install 'robustlip[sdp]'. Its result is not trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlip.domains.quadratic.program import Program
from robustlip.errors import BadInput

# The most entries of the linear map from multipliers to matrices that cvxpy gets; above it memory runs out.
_LARGEST_MAP = 5 * 10**7

# The largest program for Clarabel, which is exact but slow for large programs; SCS is less exact.
_CLARABEL_UP_TO = 80


def solve(program: Program, start: Tensor, *, solver: str | None = None, tolerance: float = 1e-5) -> Tensor:
    """λ (groups,), nearly optimal and nearly inside the program; it has to be repaired and proved. start: λ strictly inside the program.

    solver: a name that cvxpy accepts; by default CLARABEL for small programs and SCS for larger ones. Raises BadInput without cvxpy, for a program
    that is too large for it, and if the solver fails.
    """
    try:
        import cvxpy
        from scipy import sparse
    except ImportError:
        raise BadInput("expected cvxpy for solver='cvxpy', got no such module; pip install 'robustlip[sdp]', or use solver='newton'") from None
    entries = sum(ball.mid.shape[1] ** 2 * len(ball.mid) for ball in program.u)
    if entries > _LARGEST_MAP:
        raise BadInput(f"expected at most {_LARGEST_MAP} numbers in the program for cvxpy, got {entries}; use solver='newton'")
    size, value = program.size, program.bound(start)
    if not 0 < value < float("inf"):
        raise BadInput("expected multipliers strictly inside the program to start from, got others; use those of ECLipsE")
    # Unknowns relative to the start, and a matrix with unit diagonal: first-order solvers need entries of similar size.
    scale = program.matrix(2 * value, start).diagonal().rsqrt()
    relative = start[program.group]
    rows, columns, values = [], [], []
    at = 0
    for ball in program.u:
        count, n = ball.mid.shape
        u = ball.mid * scale[:n] * relative[at : at + count, None].sqrt()
        place = (torch.arange(n)[:, None] * size + torch.arange(n)).flatten()
        rows.append(place.repeat(count))
        columns.append(program.group[at : at + count].repeat_interleave(n * n) + 1)
        values.append(-(u[:, :, None] * u[:, None, :]).flatten())
        at += count
    free = torch.arange(program.rows, size)
    head = torch.arange(program.rows)
    rows += [free * (size + 1), head * (size + 1)]
    columns += [program.group + 1, torch.zeros_like(head)]
    values += [scale[free].square() * relative, scale[head].square() * value]
    table = sparse.coo_matrix(
        (torch.cat(values).numpy(), (torch.cat(rows).numpy(), torch.cat(columns).numpy())), shape=(size * size, program.groups + 1)
    ).tocsr()
    table.eliminate_zeros()
    unknown = cvxpy.Variable(program.groups + 1, nonneg=True)
    unknown.value = torch.ones(program.groups + 1).numpy()
    constant = (program.q.mid * scale * scale[:, None]).numpy().ravel()
    matrix = cvxpy.reshape(table @ unknown - constant, (size, size), order="C")
    problem = cvxpy.Problem(cvxpy.Minimize(unknown[0]), [(matrix + matrix.T) / 2 >> 0])
    name = solver or ("CLARABEL" if size <= _CLARABEL_UP_TO else "SCS")
    options = {"eps_abs": tolerance, "eps_rel": tolerance, "max_iters": 20000} if name == "SCS" else {}
    try:
        problem.solve(solver=name, **options)
    except cvxpy.error.SolverError as error:
        raise BadInput(f"expected a solution from {name}, got {error}; use another solver, or solver='newton'") from None
    if unknown.value is None:
        raise BadInput(f"expected a solution from {name}, got {problem.status}; use another solver, or solver='newton'")
    found = torch.from_numpy(unknown.value[1:].copy()).double() * start
    # A solver's 0 is not strictly inside the program.
    return torch.maximum(found, 1e-9 * start)
