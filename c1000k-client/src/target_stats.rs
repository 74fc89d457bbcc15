//! What a run has counted for each of its targets.

use nix::errno::Errno;

use crate::destination::Destination;
use crate::stats::Stop;

/// Counters of one target; each is a part of the run's.
#[derive(Clone, Debug)]
pub struct TargetStats {
    /// Where it is.
    pub destination: Destination,
    /// Connects started.
    pub attempted: u64,
    /// Connections held now.
    pub held: u64,
    /// The most connections held at once.
    pub peak: u64,
    /// Connections that were held, at once or one after the other.
    pub opened: u64,
    /// Connections given up.
    pub failed: u64,
    /// Connections held once and then gone before the end.
    pub lost: u64,
    /// Connections that the server dropped before their echo.
    pub turned_away: u64,
    /// Connections that were open for a whole connect time-out without their echo.
    pub unanswered: u64,
    /// Connects refused because the backlog of a Unix-domain socket was full.
    pub backlog_full: u64,
    /// Why no more connections to it were opened.
    pub stop: Option<Stop>,
    /// Connections closed by a storm and not back yet.
    pub(crate) away: u64,
}

impl TargetStats {
    pub(crate) fn new(destination: Destination) -> Self {
        Self {
            destination,
            attempted: 0,
            held: 0,
            peak: 0,
            opened: 0,
            failed: 0,
            lost: 0,
            turned_away: 0,
            unanswered: 0,
            backlog_full: 0,
            stop: None,
            away: 0,
        }
    }

    pub(crate) fn hold_one(&mut self) {
        self.held += 1;
        self.opened += 1;
        self.peak = self.peak.max(self.held);
    }

    pub(crate) fn lose_one(&mut self) {
        self.held -= 1;
        self.lost += 1;
    }

    /// Why nothing has succeeded for too long.
    pub(crate) fn stall(&self) -> Stop {
        match self.unanswered {
            0 if self.backlog_full > 0 => Stop::BacklogFull,
            0 => Stop::Network(Errno::ETIMEDOUT),
            _ => Stop::ServerSilent,
        }
    }

    /// Whether nothing but refusals came from it.
    pub(crate) fn was_never_there(&self) -> bool {
        self.peak == 0 && self.turned_away == 0
    }

    /// Whether most of what was held has gone.
    pub(crate) fn has_lost_most(&self) -> bool {
        self.lost > 0 && self.lost * 2 >= self.opened
    }
}

/// The reason that ends the run once all targets have one: a fault before a limit, which would only lower the goal.
pub(crate) fn stop_of_all(targets: &[TargetStats]) -> Option<Stop> {
    let stops: Option<Vec<Stop>> = targets.iter().map(|target| target.stop).collect();
    let stops = stops?;
    stops.iter().find(|stop| !stop.is_limit()).or(stops.first()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_stops_when_all_its_targets_have_and_names_a_fault_first() {
        let of = |stop| {
            let to = Destination::new(([127, 0, 0, 1], 9900), 1);
            TargetStats { stop, ..TargetStats::new(to) }
        };
        let (full, gone) = (Some(Stop::ServerFull), Some(Stop::ServerGone));
        assert_eq!(stop_of_all(&[]), None);
        assert_eq!(stop_of_all(&[of(full), of(None)]), None);
        assert_eq!(stop_of_all(&[of(full), of(Some(Stop::Ports))]), full);
        assert_eq!(stop_of_all(&[of(full), of(gone)]), gone);
    }
}
