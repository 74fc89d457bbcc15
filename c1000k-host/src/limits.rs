//! Descriptor limits: of this process (`RLIMIT_NOFILE`) and of the system.

use {
    crate::text,
    nix::sys::resource::{Resource, getrlimit, setrlimit},
    std::io,
};

/// Descriptors that a process keeps for itself: standard streams, epoll, timers, signals, its log,
/// its record and the samplers. Both ends leave so many free.
pub const RESERVED_DESCRIPTORS: u64 = 32;

/// `RLIMIT_NOFILE` of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorLimit {
    /// What holds now; the process may raise it up to the hard limit by itself.
    pub soft: u64,
    /// What only `CAP_SYS_RESOURCE` may raise.
    pub hard: u64,
}

/// Reads the descriptor limit of this process.
///
/// # Errors
/// What `getrlimit` refuses with.
pub fn descriptor_limit() -> io::Result<DescriptorLimit> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(DescriptorLimit { soft, hard })
}

/// Raises the soft descriptor limit to the hard one and returns what then holds.
///
/// # Errors
/// What `getrlimit` or `setrlimit` refuse with.
pub fn raise_descriptor_limit() -> io::Result<DescriptorLimit> {
    let limit = descriptor_limit()?;
    if limit.soft < limit.hard {
        setrlimit(Resource::RLIMIT_NOFILE, limit.hard, limit.hard)?;
    }
    descriptor_limit()
}

/// How many connections fit under a descriptor limit beside the listeners and
/// [`RESERVED_DESCRIPTORS`].
///
/// ```
/// use c1000k_host::limits::connections_within;
/// assert_eq!(connections_within(20_000, 100), 19_868);
/// assert_eq!(connections_within(64, 100), 0);
/// ```
pub fn connections_within(limit: u64, listening_ports: u64) -> u64 {
    limit.saturating_sub(listening_ports).saturating_sub(RESERVED_DESCRIPTORS)
}

/// The descriptor limit that so many connections and listeners need: the reverse of
/// [`connections_within`].
pub fn descriptors_for(connections: u64, listening_ports: u64) -> u64 {
    connections.saturating_add(listening_ports).saturating_add(RESERVED_DESCRIPTORS)
}

/// What the system as a whole allows; `None` where it can't be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemDescriptorLimits {
    /// `fs.nr_open`: the highest value that a hard limit may be raised to.
    pub per_process_max: Option<u64>,
    /// `fs.file-max`: open files of the whole system.
    pub system_max: Option<u64>,
    /// Open files now, from `fs.file-nr`.
    pub system_open: Option<u64>,
}

/// Reads the limits of the system.
pub fn system_descriptor_limits() -> SystemDescriptorLimits {
    SystemDescriptorLimits {
        per_process_max: text::read_number("/proc/sys/fs/nr_open"),
        system_max: text::read_number("/proc/sys/fs/file-max"),
        system_open: text::read_number("/proc/sys/fs/file-nr"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raising_reaches_the_hard_limit() {
        let raised =
            raise_descriptor_limit().expect("a soft limit may always rise to the hard one");
        assert_eq!(raised.soft, raised.hard);
        assert_eq!(descriptor_limit().expect("was read before"), raised);
    }

    #[test]
    fn connections_and_descriptors_are_each_others_reverse() {
        assert_eq!(connections_within(descriptors_for(1_000_000, 100), 100), 1_000_000);
        assert_eq!(descriptors_for(u64::MAX, 100), u64::MAX);
        assert_eq!(connections_within(0, 0), 0);
    }

    #[test]
    fn the_system_tells_its_limits() {
        let limits = system_descriptor_limits();
        assert!(limits.system_open <= limits.system_max, "{limits:?}");
    }
}
