"""The linear path: from hidden states and the LM head, without logits as a whole.

plan           the loop, chosen from sizes and a memory budget; a pure function
products       the three matrix products
call           what the functions have in common: arguments, checks, the rows that count
loops          the loops, over a loss that says what happens to a tile of logits
teacher        a second model beside: for distillation, and for the exact KL to a reference policy
token_stats, token_loss, ppo_loss, distill_loss      the public functions
"""
