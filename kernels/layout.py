"""What the rows of the tensors mean that kernels and library hand each other. Imports no triton."""

IGNORE = -100  # target of a row that is never read
ELSEWHERE = -1  # target of a row of which these columns are a piece that does not hold it

# What a piece of a row comes to, [SUMS, N]. m: a largest (softcapped) logit; of the others than the target,
# d = (y - m) / τ: Σ exp d and Σ exp(d) d; the target's logit, NaN where it lies elsewhere.
SUMS = ("m", "s", "t", "y_target")

# What the gradient of a row needs, [STATE, N]: max y, max p, Σ p d, 1 - p[target].
STATE = ("m", "inv_s", "mean_d", "p_others")

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")

# What a piece of two rows, of student p and teacher q, comes to, [PAIR_SUMS, N]: Σ (q - p), which would be 0
# if their normalisers were exact; the divergence; of jsd also KL(p‖m); and over the entries with p <= 1/2
# Σ p and Σ p log(q / p), or of jsd Σ p log(m / p). Of forward_kl the last is 0.
PAIR_SUMS = ("excess", "divergence", "student_kl", "others", "of_others")

# A divergence and what its gradient needs, [PAIR_STATE, N]: log (Σ exp d of q / that of p), what is
# subtracted from log (p / m), or from log (p / q), and the two sums over the others.
PAIR_STATE = ("divergence", "offset", "student_kl", "others", "of_others")

# The constants of the policy loss, [CONSTANTS, N], in memory those of a token together; they have the names
# of the public arguments.
CONSTANTS = ("mask", "old_logprob", "advantage", "entropy_coef", "importance_weight", "ref_logprob")

# What a token contributes to the policy loss and its metrics, [FIELDS, N]; 0 where masked.
FIELDS = (
    "loss",  # times the mask, before the denominator
    "logprob",
    "entropy",
    "token",  # 1 where the token counts
    "clip_fraction_low",
    "clip_fraction_high",
    "approx_kl",
    "ratio",
    "top1_prob",
    "active_fraction",  # 1 where the loss has a gradient
)
