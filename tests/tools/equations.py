"""The slow reference of the methods: the papers' equations on one entry of a matrix at a time, in Python floats."""

import math


def sign(x: float) -> float:
    return (x > 0) - (x < 0)


class ReferenceRule:
    """The state-full rule on one scalar entry, as the papers write it."""

    def __init__(self, rule: str, betas, eps: float):
        self.rule, (self.b1, self.b2), self.eps = rule, betas, eps
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, g: float) -> float:
        self.t += 1
        if self.rule == "adam":  # 1412.6980, algorithm 1
            self.m = self.b1 * self.m + (1 - self.b1) * g
            self.v = self.b2 * self.v + (1 - self.b2) * g * g
            m_hat = self.m / (1 - self.b1**self.t)
            return m_hat / (math.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)
        if self.rule == "lion":  # 2302.06675, algorithm 2
            direction = sign(self.b1 * self.m + (1 - self.b1) * g)
            self.m = self.b2 * self.m + (1 - self.b2) * g
            return direction
        self.m = self.b1 * self.m + g
        return self.m


class ReferenceEntries:
    """FRUGAL on one matrix whose subspace is a set of its entries; a plain tensor is one that is never refreshed."""

    def __init__(self, weight, *, lr, betas, eps, weight_decay, rule="adam", free="none", scale=1.0, free_scale=1.0):
        self.w = weight.flatten().tolist()
        self.lr, self.wd, self.free, self.scale, self.free_scale = lr, weight_decay, free, scale, free_scale
        self.new_rule = lambda: ReferenceRule(rule, betas, eps)
        self.rules: dict[int, ReferenceRule] = {}

    def refresh(self, chosen: list[int], on_refresh: str = "reset"):
        """`chosen` are flat positions in ascending order."""
        if on_refresh == "keep" and self.rules:
            self.rules = dict(zip(chosen, self.rules.values(), strict=True))
        elif on_refresh == "project" and self.rules:
            fresh = {i: self.new_rule() for i in chosen}
            for entry in fresh.values():
                entry.t = next(iter(self.rules.values())).t
            self.rules = {i: self.rules.get(i, fresh[i]) for i in chosen}
        else:
            self.rules = {i: self.new_rule() for i in chosen}

    def step(self, grad):
        for i, g in enumerate(grad.flatten().tolist()):
            decayed = (1 - self.lr * self.wd) * self.w[i]
            if i in self.rules:
                self.w[i] = decayed - self.lr * self.scale * self.rules[i](g)
            else:
                free = {"sign": sign(g), "sgd": g, "none": 0.0}[self.free]
                self.w[i] = decayed - self.lr * self.scale * self.free_scale * free


class ReferenceOrder:
    """The cursor of each order, moved at every refresh as the reference code moves it."""

    def __init__(self, order: str, names: list[str], active: int):
        self.order, self.names, self.active = order, names, active
        self.cursor = len(names) - 1 if order == "descending" else 0

    def next(self) -> set[str]:
        total, p, a = len(self.names), self.cursor, self.active
        if self.order == "ascending":
            chosen = [(p + i) % total for i in range(a)]
            self.cursor = (p + a) % total
        elif self.order == "descending":
            chosen = [(p - i) % total for i in range(a)]
            self.cursor = (p - a) % total
        else:
            half = [(p + i) % (total // 2) for i in range(a // 2)]
            chosen = half + [total - 1 - i for i in half]
            self.cursor = (p + a // 2) % (total // 2)
        return {self.names[i] for i in chosen}
