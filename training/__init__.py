"""A user of aer_fast: a PPO trainer for causal language models of transformers.

In the order in which a run meets them, each importing only what stands before it:

    processes, files             how a run fails, ends and writes
    config                       every flag, and the presets
    temptations, tasks           problems that are generated
    units, forms, responses, answers  what an answer is, and whether a response has the right one
    tables, data                 problems that are read
    rewards                      scores of responses, in processes of their own
    batch, attention             sequences as the model reads them, and how it keeps them apart
    policy, distributed, scratch, models  the model with its loss; on many ranks; made; loaded
    engine, rollout              vLLM; prompts and sampling
    entropy                      the bonus
    advantages, learner          from rewards to updates
    agreement                    whether the sampler samples from the policy
    evaluation                   pass@k and maj@k
    checkpoint, record           what is kept of a run, and what is shown of it
    train                        the algorithm, and its command
    plot, evaluate, experiments  the other commands
    study                        the runs of STUDY.md
    judgement, findings, figures, evidence  what they show
"""
