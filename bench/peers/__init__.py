"""What is measured: ours, plain PyTorch, and the peers, which users would pick instead.

    planned     our linear functions in a loop that is asked for
    calls       how each provider is called
    providers   which are measured at a case, and what is timed of each

Each imports what stands above it.
"""
