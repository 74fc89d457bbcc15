//! The counters of each target.

use nix::errno::Errno;

use crate::destination::Destination;
use crate::stats::Stop;

/// Counters of one target; the run's counters are their sums.
#[derive(Clone, Debug)]
pub struct TargetStats {
    /// Its address and ports.
    pub destination: Destination,
    /// Connects started.
    pub attempted: u64,
    /// Connections held now.
    pub held: u64,
    /// The maximum number of connections held at once.
    pub peak: u64,
    /// Connections that were held at any time.
    pub opened: u64,
    /// Connections that failed permanently.
    pub failed: u64,
    /// Connections that were held and lost before the end.
    pub lost: u64,
    /// Connections that the server dropped before their echo.
    pub refused_by_server: u64,
    /// Connections that were open for the connect timeout without their echo.
    pub unanswered: u64,
    /// Connects refused because the backlog of a Unix-domain socket was full.
    pub backlog_full: u64,
    /// Why no more connections to it were opened.
    pub stop: Option<Stop>,
    /// Connections closed by churn or a storm, and not yet reopened.
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
            refused_by_server: 0,
            unanswered: 0,
            backlog_full: 0,
            stop: None,
            away: 0,
        }
    }

    pub(crate) fn hold_one(&mut self) {
        self.opened += 1;
        self.held += 1;
        self.peak = self.peak.max(self.held);
    }

    /// A connection that was closed by churn or a storm is held again.
    pub(crate) fn hold_again(&mut self) {
        self.away -= 1;
        self.held += 1;
        self.peak = self.peak.max(self.held);
    }

    pub(crate) fn lose_one(&mut self) {
        self.held -= 1;
        self.lost += 1;
    }

    /// The reason if nothing has succeeded for too long.
    pub(crate) fn stall(&self) -> Stop {
        match self.unanswered {
            0 if self.backlog_full > 0 => Stop::BacklogFull,
            0 => Stop::Network(Errno::ETIMEDOUT),
            _ => Stop::ServerSilent,
        }
    }

    /// Whether every attempt was refused.
    pub(crate) fn was_never_there(&self) -> bool {
        self.peak == 0 && self.refused_by_server == 0
    }

    /// Whether most connections that were held were lost.
    pub(crate) fn has_lost_most(&self) -> bool {
        self.lost > 0 && self.lost * 2 >= self.opened
    }
}

/// The reason that ends the run once all targets have one. A fault takes precedence over a limit, which only lowers the
/// number of connections.
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
