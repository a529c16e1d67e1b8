"""What keeps a run that nobody watches from going wrong in silence.

Policies are pure functions (`stalls`, `spikes`, `positions`, `memory`); what touches clocks, ranks
and processes is thin and apart (`heartbeat`, `watchdog`, `launcher`, `rank_check`, `rollback`).
"""
