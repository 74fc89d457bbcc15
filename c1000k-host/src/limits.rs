//! Descriptor limits: of this process (`RLIMIT_NOFILE`) and of the system.

use {
    crate::{format, text},
    nix::{
        libc::RLIM_INFINITY,
        sys::resource::{Resource, getrlimit, setrlimit},
    },
    std::{fs, io, path::Path},
};

/// Descriptors that a process needs besides connections: standard streams, epoll, timers, signals, log, record,
/// samplers, and inherited ones. Both ends leave this number free.
pub const RESERVED_DESCRIPTORS: u64 = 32;

/// The part of [`RESERVED_DESCRIPTORS`] for inherited descriptors: shells and build tools leave a few open. More than
/// this number reduce the room for connections.
pub const INHERITED_DESCRIPTORS: u64 = 16;

/// Bits of `CapEff`.
const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_IPC_LOCK: u64 = 1 << 14;

/// The user namespace whose capabilities the kernel checks; its number is fixed (`PROC_USER_INIT_INO`).
const FIRST_USER_NAMESPACE: &str = "user:[4026531837]";

/// Standard input, output and error.
const STANDARD_STREAMS: u64 = 3;

/// `RLIMIT_NOFILE` of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorLimit {
    /// The limit that applies; the process may raise it to the hard limit.
    pub soft: u64,
    /// The limit that only `CAP_SYS_RESOURCE` may raise.
    pub hard: u64,
}

/// The result of raising the descriptor limit.
#[derive(Debug)]
pub struct Raised {
    /// The present limit. If raising was refused, both values are the number that the process really has.
    pub limit: DescriptorLimit,
    /// One line, if it is less than the hard limit.
    pub shortfall: Option<String>,
}

/// Reads the descriptor limit of this process by `getrlimit`, or, if that is refused, from `/proc/self/limits`.
///
/// # Errors
/// The error of `getrlimit`.
pub fn descriptor_limit() -> io::Result<DescriptorLimit> {
    let from_proc = || limit_in(&text::read("/proc/self/limits")?);
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) => Ok(DescriptorLimit { soft, hard }),
        Err(refusal) => from_proc().ok_or(refusal.into()),
    }
}

/// Raises the soft descriptor limit to the hard one, or as far as the system permits, and returns the result.
///
/// The kernel refuses if the hard limit is above `fs.nr_open`, which may have been lowered since; then both are set to
/// that value, the highest possible. A sandbox may refuse any change.
///
/// # Errors
/// The limit can't be read.
pub fn raise_descriptor_limit() -> io::Result<Raised> {
    let per_process_max = system_descriptor_limits(Path::new("/")).per_process_max;
    let set = |to| setrlimit(Resource::RLIMIT_NOFILE, to, to).map_err(io::Error::from);
    Ok(raised(descriptor_limit()?, per_process_max, set))
}

fn raised(
    limit: DescriptorLimit,
    per_process_max: Option<u64>,
    set: impl Fn(u64) -> io::Result<()>,
) -> Raised {
    let both = |to| DescriptorLimit { soft: to, hard: to };
    if limit.soft >= limit.hard {
        return Raised { limit, shortfall: None };
    }
    let Err(refusal) = set(limit.hard) else {
        return Raised { limit: both(limit.hard), shortfall: None };
    };
    let within = per_process_max.filter(|most| (limit.soft + 1..limit.hard).contains(most));
    let reached = within.filter(|&most| set(most).is_ok()).unwrap_or(limit.soft);
    let shortfall = format!(
        "the descriptor limit is {}, and can't be raised to the hard one of {}: {refusal}; see fs.nr_open, and \
         whether a sandbox confines this process",
        format::count(reached),
        format::count(limit.hard)
    );
    Raised { limit: both(reached), shortfall: Some(shortfall) }
}

/// `Max open files            1024                 524288               files`
fn limit_in(limits: &str) -> Option<DescriptorLimit> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let number = |word: &str| if word == "unlimited" { Some(u64::MAX) } else { word.parse().ok() };
    let mut words = line.split_whitespace().map(number);
    Some(DescriptorLimit { soft: words.next()??, hard: words.next()?? })
}

/// Open descriptors below this limit, without the standard streams: at the start of a process, the inherited ones. 0 if
/// they can't be read.
pub fn open_descriptors(limit: u64) -> u64 {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let open = numbers.filter(|number| (STANDARD_STREAMS..limit).contains(number)).count() as u64;
    // One of them is the descriptor of this directory.
    open.saturating_sub(1)
}

/// Whether `fs.file-max` does not bind this process: `CAP_SYS_ADMIN` may exceed it.
pub fn may_exceed_file_max() -> bool {
    has_capability(CAP_SYS_ADMIN)
}

/// The memory that this user's processes may lock (`RLIMIT_MEMLOCK`), in bytes; `None` if there is no limit, or if this
/// process may exceed it (`CAP_IPC_LOCK`).
pub fn locked_bytes_max() -> Option<u64> {
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    (soft != RLIM_INFINITY && !has_capability(CAP_IPC_LOCK)).then_some(soft)
}

/// In another user namespace a process may have all capabilities, and none of them applies here.
fn has_capability(capability: u64) -> bool {
    let namespace = fs::read_link("/proc/self/ns/user");
    namespace.is_ok_and(|namespace| namespace == Path::new(FIRST_USER_NAMESPACE))
        && text::read("/proc/self/status").is_some_and(|status| is_effective(&status, capability))
}

fn is_effective(status: &str, capability: u64) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.is_some_and(|bits| bits & capability != 0)
}

/// How many connections fit under a descriptor limit besides the listeners and [`RESERVED_DESCRIPTORS`].
///
/// ```
/// use c1000k_host::limits::connections_within;
/// assert_eq!(connections_within(20_000, 100), 19_868);
/// assert_eq!(connections_within(64, 100), 0);
/// ```
pub fn connections_within(limit: u64, listening_ports: u64) -> u64 {
    limit.saturating_sub(listening_ports).saturating_sub(RESERVED_DESCRIPTORS)
}

/// The descriptor limit that this number of connections and listeners needs: the inverse of [`connections_within`].
pub fn descriptors_for(connections: u64, listening_ports: u64) -> u64 {
    connections.saturating_add(listening_ports).saturating_add(RESERVED_DESCRIPTORS)
}

/// The limits of the system; `None` if they can't be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemDescriptorLimits {
    /// `fs.nr_open`: the highest value that a hard limit may be raised to.
    pub per_process_max: Option<u64>,
    /// `fs.file-max`: open files of the whole system.
    pub system_max: Option<u64>,
    /// Open files now, from `fs.file-nr`.
    pub system_open: Option<u64>,
}

/// Reads the limits of the system with this root directory.
pub fn system_descriptor_limits(root: &Path) -> SystemDescriptorLimits {
    let first = |name| text::read_sysctl(root, name)?.first().copied();
    SystemDescriptorLimits {
        per_process_max: first("fs.nr_open"),
        system_max: first("fs.file-max"),
        system_open: first("fs.file-nr"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: DescriptorLimit = DescriptorLimit { soft: 1_024, hard: 2_000_000 };

    /// A system that sets limits up to this one.
    fn up_to(most: u64) -> impl Fn(u64) -> io::Result<()> {
        move |to| if to <= most { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }

    #[test]
    fn raising_reaches_the_hard_limit() {
        let raised =
            raise_descriptor_limit().expect("a soft limit may always rise to the hard one").limit;
        assert_eq!(raised.soft, raised.hard);
        assert_eq!(descriptor_limit().expect("was read before"), raised);
    }

    #[test]
    fn a_hard_limit_above_what_the_kernel_allows_is_raised_as_far_as_it_goes() {
        let raised = raised(LIMIT, Some(1_048_576), up_to(1_048_576));
        assert_eq!(raised.limit, DescriptorLimit { soft: 1_048_576, hard: 1_048_576 });
        let line = raised.shortfall.expect("it falls short");
        assert!(line.contains("1,048,576") && line.contains("fs.nr_open"), "{line}");
    }

    #[test]
    fn where_raising_is_refused_the_soft_limit_applies() {
        for per_process_max in [None, Some(1_048_576), Some(512)] {
            let raised = raised(LIMIT, per_process_max, up_to(0));
            assert_eq!(raised.limit, DescriptorLimit { soft: 1_024, hard: 1_024 });
            assert!(raised.shortfall.is_some_and(|line| line.contains("is 1,024,")));
        }
        let raised = raised(DescriptorLimit { soft: 9, hard: 9 }, None, up_to(0));
        assert!(raised.limit.soft == 9 && raised.shortfall.is_none(), "{raised:?}");
    }

    #[test]
    fn the_limit_is_read_from_proc_too() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
            Max processes             96365                96365                processes \n\
            Max open files            1024                 2000000              files     \n";
        assert_eq!(limit_in(text), Some(LIMIT));
        let own = text::read("/proc/self/limits").and_then(|limits| limit_in(&limits));
        assert_eq!(own, descriptor_limit().ok());
        for text in ["", "Max open files", "Max open files 1", "Max open files a b files"] {
            assert_eq!(limit_in(text), None, "{text}");
        }
    }

    #[test]
    fn open_descriptors_below_the_limit_are_counted() {
        // Other tests of this process open files at the same time.
        let held: Vec<_> = (0..100).map(|_| fs::File::open("/proc/self/stat")).collect();
        assert!(open_descriptors(u64::MAX) >= 100 && held.len() == 100);
        assert!(open_descriptors(20) <= 17);
    }

    #[test]
    fn a_capability_is_a_bit() {
        let status = |bits: &str| format!("Name:\tx\nCapPrm:\t0\nCapEff:\t{bits}\n");
        assert!(is_effective(&status("000001ffffffffff"), CAP_SYS_ADMIN));
        assert!(!is_effective(&status("00000000a80425fb"), CAP_SYS_ADMIN), "a container's root");
        assert!(!is_effective(&status("x"), CAP_SYS_ADMIN) && !is_effective("", CAP_SYS_ADMIN));
    }

    #[test]
    fn connections_and_descriptors_are_inverse() {
        assert_eq!(connections_within(descriptors_for(1_000_000, 100), 100), 1_000_000);
        assert_eq!(descriptors_for(u64::MAX, 100), u64::MAX);
        assert_eq!(connections_within(0, 0), 0);
    }

    #[test]
    fn the_limits_of_the_system_can_be_read() {
        let limits = system_descriptor_limits(Path::new("/"));
        assert!(limits.system_open <= limits.system_max, "{limits:?}");
    }
}
