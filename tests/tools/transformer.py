"""The model from its equations, a position and a head at a time, in float64."""

import math

import torch


def reference_logits(model, x, starts=(0,), seen=None):
    """Logits [rows, seq, vocab]; documents begin at `starts`. `seen`: a list for the attention weights of each row,
    [layers, heads, query, key]."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    head_dim, kv_heads = c.dim // c.heads, c.kv_heads or c.heads

    def norm(v, weight):
        return v / (v.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def rope(v, position):  # one head's vector
        out = v.clone()
        for i in range(head_dim // 2):
            angle = position * c.rope_theta ** (-2 * i / head_dim)
            cos, sin, a, b = math.cos(angle), math.sin(angle), v[2 * i], v[2 * i + 1]
            out[2 * i], out[2 * i + 1] = a * cos - b * sin, a * sin + b * cos
        return out

    rows = []
    for row in x:
        attention = torch.zeros(c.layers, c.heads, len(row), len(row), dtype=torch.float64)
        h = w["embed.weight"][row]
        for layer in range(c.layers):
            pre = f"layers.{layer}."
            n = norm(h, w[pre + "attn_norm.weight"])
            q, k, v = (n @ w[f"{pre}attn.{p}.weight"].T for p in "qkv")
            mixed = torch.zeros(len(row), c.dim, dtype=torch.float64)
            for head in range(c.heads):
                kv = head * kv_heads // c.heads
                here, there = slice(head * head_dim, (head + 1) * head_dim), slice(kv * head_dim, (kv + 1) * head_dim)
                qs, ks = q[:, here], k[:, there]
                if c.smeared_keys:
                    own = 1 / (1 + math.exp(-w[pre + "attn.smear"][kv]))
                    smeared = [own * u + (1 - own) * ks[t - 1] for t, u in enumerate(ks)]
                    ks = torch.stack([u if t in starts else smeared[t] for t, u in enumerate(ks)])
                if c.qk_norm:
                    qs, ks = norm(qs, w[pre + "attn.q_norm.weight"]), norm(ks, w[pre + "attn.k_norm.weight"])
                qs = torch.stack([rope(u, t) for t, u in enumerate(qs)])
                ks = torch.stack([rope(u, t) for t, u in enumerate(ks)])
                for t in range(len(row)):
                    visible = slice(max(start for start in starts if start <= t), t + 1)
                    weights = torch.softmax(qs[t] @ ks[visible].T / math.sqrt(head_dim), -1)
                    attention[layer, head, t, visible] = weights
                    mixed[t, here] = weights @ v[visible, there]
            h = h + mixed @ w[pre + "attn.o.weight"].T
            n = norm(h, w[pre + "mlp_norm.weight"])
            gate, up = n @ w[pre + "mlp.gate.weight"].T, n @ w[pre + "mlp.up.weight"].T
            h = h + (gate / (1 + torch.exp(-gate)) * up) @ w[pre + "mlp.down.weight"].T
        head = w["embed.weight"] if c.tied else w["lm_head.weight"]
        rows.append(norm(h, w["norm.weight"]) @ head.T)
        if seen is not None:
            seen.append(attention)
    return torch.stack(rows)
