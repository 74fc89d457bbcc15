//! The verdict of a run: reached or short, the limit, and the remedy.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use c1000k_host::check::FileTable;
use c1000k_host::format;
use c1000k_record::{Limit, Verdict};
use nix::errno::Errno;

use crate::destination::{self, Destination};
use crate::failures;
use crate::protocols::ECHO;
use crate::stats::{RunStats, Stop};
use crate::target::Target;
use crate::target_stats::{TargetStats, stop_of_all};

/// Targets whose stop is explained; of the others, their number.
const SENTENCES_MAX: usize = 3;

/// The outcome of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The target; if none was given, what limits and server allowed.
    pub(crate) target: u64,
    /// Connections of the target that were given up.
    pub(crate) failed: u64,
    pub(crate) verdict: Verdict,
    pub(crate) limit: Option<Limit>,
    /// What limited the run, and the remedy, in one line.
    pub(crate) detail: Option<String>,
}

/// Judges a run to these destinations that has ended.
pub(crate) fn judge(target: &Target, stats: &RunStats, to: &[Destination]) -> Outcome {
    let (limit, detail) = match cap(target, stats, to) {
        Some((limit, detail)) => (Some(limit), Some(detail)),
        None => (None, loss(stats)),
    };
    let target = if is_lowered(target, stats) { stats.peak } else { target.connections };
    let is_reached = stats.peak >= target
        && target > 0
        && stats.lost == 0
        && stats.stop != Some(Stop::Interrupted)
        && is_verified(stats, target);
    let verdict = match stats.verified() {
        _ if !is_reached => Verdict::Short,
        Some(_) => Verdict::Reached,
        None => Verdict::Held,
    };
    // Connections that a full server dropped past a lowered target do not belong to it.
    let failed = stats.failed.min(target.saturating_sub(stats.peak));
    Outcome { target, failed, verdict, limit, detail }
}

/// Whether limits have lowered a target that was not given. A fault does not, nor do failed connections to a target that
/// was not stopped.
fn is_lowered(target: &Target, stats: &RunStats) -> bool {
    let of_targets = stats.targets.iter().filter_map(|target| target.stop);
    let stops: Vec<Stop> = stats.stop.into_iter().chain(of_targets).collect();
    let has_failed = |target: &TargetStats| target.stop.is_none() && target.failed > 0;
    let is_complete = stats.stop.is_some() || !stats.targets.iter().any(has_failed);
    !target.is_asked
        && stats.peak > 0
        && !stops.is_empty()
        && stops.into_iter().all(Stop::is_limit)
        && is_complete
}

/// Whether each pass has verified all of them, if there were passes.
fn is_verified(stats: &RunStats, target: u64) -> bool {
    let passes = &stats.verified_passes;
    passes.is_empty() || (passes.len() == 2 && passes.iter().all(|&verified| verified >= target))
}

fn cap(target: &Target, stats: &RunStats, to: &[Destination]) -> Option<(Limit, String)> {
    let stop = match stats.stop {
        Some(Stop::Interrupted) => stats.stop,
        _ if stats.has_lost_most() => return Some((limit_of_losses(stats), losses(stats))),
        None if stats.peak == 0 && stats.unanswered > 0 => Some(Stop::ServerSilent),
        None if stats.peak == 0 && stats.failed > 0 => Some(nothing_came(stats)),
        stop => stop,
    };
    let stopped = stopped_targets(target, stats).filter(|_| stop != Some(Stop::Interrupted));
    let is_by_target = stats.stop.is_none() || stop_of_all(&stats.targets).is_some();
    if is_by_target && stopped.is_some() {
        return stopped;
    }
    if let Some(stop) = stop {
        let next = next_limit(stop, target, stats);
        let others = stopped.map_or_else(String::new, |(_, detail)| format!("; {detail}"));
        let detail = sentence(stop, stats.peak, target, stats, to);
        return Some((limit_of(stop), detail + &next + &others));
    }
    if stats.peak < u64::from(target.goal) && stats.failed > 0 {
        return Some(failed(stats));
    }
    if target.is_asked && stats.peak >= target.connections {
        return None;
    }
    let lowered = target.cap.as_ref()?;
    Some((lowered.limit, lowered.detail.clone()))
}

/// The limit of this machine that is next if another one was reached first: raising only that one does not help much.
fn next_limit(stop: Stop, target: &Target, stats: &RunStats) -> String {
    match &target.cap {
        Some(cap) if stop.is_limit() && stats.peak > 0 && cap.limit != limit_of(stop) => {
            format!("; the client's own limit is next: {}", cap.detail)
        }
        _ => String::new(),
    }
}

/// The failure of the last attempt, if all failed and they were too few to end the ramp.
fn nothing_came(stats: &RunStats) -> Stop {
    match stats.failures.last() {
        Some(Errno::EBADMSG) => Stop::NotAnEcho,
        Some(errno) => Stop::Network(errno),
        None => Stop::Network(Errno::ETIMEDOUT),
    }
}

/// Which of several targets got no more connections, and why; `None` if none was stopped.
fn stopped_targets(target: &Target, stats: &RunStats) -> Option<(Limit, String)> {
    if stats.targets.len() < 2 {
        return None;
    }
    let stopped = || stats.targets.iter().filter_map(|to| to.stop.map(|stop| (to, stop)));
    let (_, first) = stopped().next()?;
    let sentences: Vec<String> = stopped()
        .map(|(to, stop)| {
            let name = to.destination.to_string();
            let sentence =
                sentence(stop, to.peak, target, stats, std::slice::from_ref(&to.destination));
            if sentence.contains(&name) { sentence } else { format!("{name}: {sentence}") }
        })
        .take(SENTENCES_MAX)
        .collect();
    let more = match stopped().count() - sentences.len() {
        0 => String::new(),
        more => format!("; and {} more", format::counted(more as u64, "target")),
    };
    Some((limit_of(first), sentences.join("; ") + &more))
}

/// The part of several targets in a figure, of those that have one: ` (127.0.0.1:9900: 7)`.
fn by_target(stats: &RunStats, figure: fn(&TargetStats) -> u64) -> String {
    if stats.targets.len() < 2 {
        return String::new();
    }
    let parts = stats.targets.iter().filter(|target| figure(target) > 0);
    let parts: Vec<String> = parts
        .map(|target| format!("{}: {}", target.destination, format::count(figure(target))))
        .collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", destination::list(&parts)) }
}

fn limit_of(stop: Stop) -> Limit {
    match stop {
        Stop::Descriptors(_) => Limit::Descriptors,
        Stop::Memory(_) => Limit::Memory,
        Stop::Watches => Limit::Watches,
        Stop::Ports => Limit::Ports,
        Stop::ServerFull
        | Stop::ServerSilent
        | Stop::NotAnEcho
        | Stop::NothingListens
        | Stop::ServerGone
        | Stop::BacklogFull => Limit::Server,
        Stop::Network(_) | Stop::NoAddress => Limit::Network,
        Stop::Interrupted => Limit::Interrupted,
    }
}

/// What has ended the opening of connections to these destinations, of which `peak` were held, and what to do about it.
fn sentence(
    stop: Stop,
    peak: u64,
    target: &Target,
    stats: &RunStats,
    to: &[Destination],
) -> String {
    if let [to] = to
        && to.is_unix()
        && let Some(sentence) = unix_sentence(stop, peak, to)
    {
        return sentence;
    }
    let held = format::counted(peak, "connection");
    let to = destination::list(to);
    let answer = if is_echo(stats) { "echo" } else { "answer" };
    let no_server = no_server(stats);
    match stop {
        Stop::Descriptors(Errno::EMFILE) if target.file_table == FileTable::Registered => {
            format!(
                "descriptors ran out at {held} (EMFILE): no further table of registered files could be created; to go \
             further: raise ulimit -l, which both ends of one user share, or ulimit -n"
            )
        }
        Stop::Descriptors(errno) => format!(
            "descriptors ran out at {held} ({errno:?}); to go further: \
             raise ulimit -n, or fs.file-max if the whole system has too few"
        ),
        Stop::Memory(errno) => format!(
            "the kernel has no memory for more than {held} ({errno:?}); to go further: \
             add memory, or raise net.ipv4.tcp_mem or the cgroup's limit"
        ),
        Stop::Watches => format!(
            "epoll watches ran out at {held} (ENOSPC); to go further: \
             raise fs.epoll.max_user_watches"
        ),
        Stop::Ports if peak == 0 => format!(
            "no local port is free for {to} (EADDRNOTAVAIL){}: other connections to it use them; \
             give more ports (--ports), another --source, or a wider net.ipv4.ip_local_port_range",
            reserved(target)
        ),
        Stop::Ports => format!(
            "local ports ran out at {held} (EADDRNOTAVAIL){}; to go further: more source addresses \
             (--source), more ports (--ports), or a wider net.ipv4.ip_local_port_range",
            reserved(target)
        ),
        Stop::NoAddress => format!(
            "this machine has no address from which it can reach {to} (EADDRNOTAVAIL): look at `ip address`, \
             and for IPv6 whether it is switched off (net.ipv6.conf.*.disable_ipv6)"
        ),
        Stop::ServerFull if peak == 0 && stats.verified().is_none() => format!(
            "the server on {to} drops every connection at once: it is full, or refuses every client; \
             look at its log"
        ),
        Stop::ServerFull if peak == 0 && stats.has_answers_in_part() => format!(
            "the server on {to} ends every connection after a part of its {answer}: it is \
             {no_server}, or fails: look at its log"
        ),
        Stop::ServerFull if peak == 0 => format!(
            "the server on {to} drops every connection before its {answer}: it is full, or {no_server}"
        ),
        Stop::ServerFull => format!(
            "the server was the cap: it dropped every connection past {held}; to go further: \
             raise its limit (ulimit -n, --max-connections) where it runs"
        ),
        Stop::ServerSilent if peak == 0 && stats.verified().is_none() => {
            format!("the server on {to} leaves every connection waiting: it hangs; look at its log")
        }
        Stop::ServerSilent if peak == 0 && stats.has_answers_in_part() => format!(
            "the server on {to} sends a part of the {answer} and no more: it is {no_server}, or \
             slow: a longer --connect-timeout may help"
        ),
        Stop::ServerSilent if peak == 0 => format!(
            "the server on {to} takes connections and answers none: it hangs, or is {no_server}"
        ),
        Stop::ServerSilent if is_verified(stats, peak) => format!(
            "the server was the cap: it answers {held} and leaves all others waiting; \
             to go further: raise its limit (ulimit -n) where it runs"
        ),
        Stop::ServerSilent => {
            format!("the server stopped answering at {held}; look at its log and its memory")
        }
        Stop::NotAnEcho if !is_echo(stats) => {
            format!("the server on {to} is {no_server}")
        }
        Stop::NotAnEcho => format!(
            "the server on {to} sends other bytes back than it got: it is no echo server; \
             --no-verify skips the echo"
        ),
        Stop::NothingListens => format!(
            "nothing listens on {to}: start c1000k-server there first, or give the port and \
             --ports of a server that runs"
        ),
        Stop::ServerGone => format!(
            "nothing listens on {to} any more: the server closed its ports at {held}; \
             look at its log"
        ),
        Stop::Network(errno) if peak == 0 => format!(
            "no connection to {to} came about ({errno:?}): look at the address, the route and \
             firewalls on the way"
        ),
        Stop::Network(errno) => format!(
            "the network allowed no more than {held} ({errno:?}): look at the route, firewalls and \
             nf_conntrack_max on the way, and whether the server still accepts"
        ),
        Stop::BacklogFull => format!(
            "the backlog of {to} stayed full at {held} (EAGAIN): the server does not accept; look at its log"
        ),
        Stop::Interrupted => {
            format!(
                "a signal ended the run early, with {} held",
                format::counted(stats.held, "connection")
            )
        }
    }
}

/// What only a Unix-domain socket can answer; `None` where the sentence for TCP fits.
fn unix_sentence(stop: Stop, peak: u64, to: &Destination) -> Option<String> {
    let is_file_of = |of: fn(&Path) -> bool| to.path().is_some_and(of);
    Some(match stop {
        Stop::NothingListens if is_file_of(|path| path.exists() && !is_socket(path)) => {
            format!("{to} is no socket: give the path of the socket that the server listens on")
        }
        Stop::NothingListens if is_file_of(is_socket) => format!(
            "nothing listens on {to} (ECONNREFUSED): the socket is left from a server that has ended; start the \
             server"
        ),
        Stop::NothingListens => format!("nothing listens on {to}: start the server first"),
        Stop::ServerGone => format!(
            "nothing listens on {to} any more: the server has closed its socket at {}; look at its log",
            format::counted(peak, "connection")
        ),
        Stop::Network(Errno::ENOENT | Errno::ENOTDIR) => format!(
            "there is no socket at {to}: start the server first, or give the path of its socket"
        ),
        Stop::Network(Errno::EACCES | Errno::EPERM) => format!(
            "no permission to connect to {to} (EACCES): that takes write permission for the socket, and search \
             permission for its directories"
        ),
        Stop::Network(Errno::EPROTOTYPE) => format!(
            "{to} is no stream socket (EPROTOTYPE): give the path of a socket of type SOCK_STREAM"
        ),
        Stop::Network(errno) => format!(
            "no connection to {to} could be opened ({errno:?}): look at the path and at the server's log"
        ),
        _ => return None,
    })
}

fn is_socket(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.file_type().is_socket())
}

fn is_echo(stats: &RunStats) -> bool {
    stats.expected == ECHO
}

/// What kind of server does not answer as expected.
fn no_server(stats: &RunStats) -> String {
    if is_echo(stats) {
        return "no echo server (--no-verify skips the echo)".to_owned();
    }
    let complaint = stats.complaint.as_ref();
    let complaint = complaint.map_or_else(String::new, |complaint| format!("; {complaint}"));
    format!("not what was expected ({}{complaint})", stats.expected)
}

fn reserved(target: &Target) -> String {
    match target.local_ports_reserved {
        0 => String::new(),
        count => {
            let count = format::count(count);
            format!("; {count} more are reserved (net.ipv4.ip_local_reserved_ports)")
        }
    }
}

/// Some were lost, which is not a limit.
fn loss(stats: &RunStats) -> Option<String> {
    (stats.lost > 0).then(|| losses(stats))
}

/// What happened to the lost connections, by the most frequent failure.
fn losses(stats: &RunStats) -> String {
    let lost = format!(
        "{} of {} lost ({}){}",
        format::count(stats.lost),
        format::counted(stats.opened, "connection"),
        stats.losses,
        by_target(stats, |target| target.lost)
    );
    let most_at_once = format::count(stats.peak);
    let answer = if is_echo(stats) { "echo" } else { "answer" };
    match seen(stats) {
        Seen::OtherBytes if !is_echo(stats) => {
            format!("the server's answer was {}: {lost}", no_server(stats))
        }
        Seen::OtherBytes => format!(
            "the server sent other bytes than it got: {lost}; it is no echo server, or mixes its \
             connections up (--no-verify skips the echo)"
        ),
        Seen::Silence if stats.lost_in_part * 2 > stats.lost => format!(
            "the server sent a part of the {answer} and no more: {lost}; it hangs, or the way to it is \
             broken: look at its log and its memory"
        ),
        Seen::Silence => format!(
            "the server stopped answering: {lost}; it hangs, or the way to it is broken: look at its \
             log and its memory"
        ),
        Seen::Closed if stats.peak * 2 <= stats.opened => format!(
            "the server closes connections soon after they open: {lost}, and no more than \
             {most_at_once} were held at once; look at its log and its idle timeout"
        ),
        Seen::Closed if stats.has_lost_most() => format!(
            "the server went away: {lost}; look at its log: was it killed because memory ran out, or \
             does it close idle connections?"
        ),
        Seen::Closed => format!(
            "{lost}: the server closed them (does it close idle ones?), or something on the way"
        ),
        Seen::Failed => {
            format!("the network failed: {lost}; look at the route and firewalls on the way")
        }
    }
}

/// The most frequent failure of lost connections.
enum Seen {
    /// Wrong or unexpected bytes.
    OtherBytes,
    Silence,
    /// The end of the stream, or a reset.
    Closed,
    /// An error of the network.
    Failed,
}

fn seen(stats: &RunStats) -> Seen {
    match stats.losses.most() {
        Some("EBADMSG") => Seen::OtherBytes,
        Some("ETIMEDOUT") => Seen::Silence,
        Some(failures::EOF | "ECONNRESET" | "ECONNABORTED" | "EPIPE") => Seen::Closed,
        _ => Seen::Failed,
    }
}

fn limit_of_losses(stats: &RunStats) -> Limit {
    if let Seen::Failed = seen(stats) { Limit::Network } else { Limit::Server }
}

/// Some could not be opened.
fn failed(stats: &RunStats) -> (Limit, String) {
    let failed = format!(
        "given up: {}{}",
        format::counted(stats.failed, "connection"),
        by_target(stats, |target| target.failed)
    );
    let failures = &stats.failures;
    if failures.most() == Some("EBADMSG") {
        let detail = format!(
            "{failed} ({failures}): the server sent other bytes back \
             than it got"
        );
        return (Limit::Server, detail);
    }
    let limit = if stats.unanswered > 0 { Limit::Server } else { Limit::Network };
    let remedy = if failures.has("ETIMEDOUT") {
        "a longer --connect-timeout or fewer --in-flight may help"
    } else {
        "look at the route and firewalls on the way"
    };
    (limit, format!("{failed} ({failures}); {remedy}"))
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;
    use std::time::Instant;

    use super::*;
    use crate::target::Cap;

    fn to() -> &'static [Destination] {
        static TO: OnceLock<Destination> = OnceLock::new();
        std::slice::from_ref(TO.get_or_init(|| Destination::new(([127, 0, 0, 1], 9900), 100)))
    }

    fn asked(target: u64) -> Target {
        Target {
            is_asked: true,
            connections: target,
            goal: target as u32,
            cap: None,
            file_table: FileTable::Process,
            local_ports_reserved: 0,
        }
    }

    fn left_out(target: u64) -> Target {
        let cap = Cap { limit: Limit::Descriptors, detail: "19 of 1,000".to_owned() };
        Target { is_asked: false, cap: Some(cap), ..asked(target) }
    }

    fn stats(count: u64) -> RunStats {
        let mut stats = RunStats::new(Instant::now(), true).unwrap();
        (stats.attempted, stats.opened, stats.peak, stats.held) = (count, count, count, count);
        stats.verified_passes = vec![count, count];
        stats
    }

    #[test]
    fn a_shortage_of_files_is_named_by_the_table_and_the_errno() {
        let registered = Target { file_table: FileTable::Registered, ..asked(10) };
        let detail = |target: &Target, errno| {
            let mut stats = stats(9);
            stats.stop = Some(Stop::Descriptors(errno));
            judge(target, &stats, to()).detail.unwrap()
        };
        assert!(detail(&registered, Errno::EMFILE).contains("ulimit -l"));
        for (target, errno) in [(&registered, Errno::ENFILE), (&asked(10), Errno::EMFILE)] {
            let detail = detail(target, errno);
            assert!(detail.contains("fs.file-max") && !detail.contains("ulimit -l"), "{detail}");
        }
    }

    #[test]
    fn all_held_and_verified_twice_is_reached() {
        let outcome = judge(&asked(10), &stats(10), to());
        assert_eq!((outcome.verdict, outcome.limit), (Verdict::Reached, None));
    }

    #[test]
    fn all_held_without_verification_is_held() {
        let mut unverified = stats(10);
        unverified.verified_passes = vec![];
        assert_eq!(judge(&asked(10), &unverified, to()).verdict, Verdict::Held);
        assert_eq!(judge(&asked(11), &unverified, to()).verdict, Verdict::Short);
    }

    #[test]
    fn a_lowered_target_that_is_reached_names_its_limit() {
        let outcome = judge(&left_out(10), &stats(10), to());
        assert_eq!(outcome.verdict, Verdict::Reached);
        assert_eq!(outcome.limit, Some(Limit::Descriptors));
    }

    #[test]
    fn a_given_target_that_is_reached_has_no_limit() {
        let target = Target { is_asked: true, ..left_out(10) };
        assert_eq!(judge(&target, &stats(10), to()).limit, None);
        assert_eq!(judge(&target, &stats(9), to()).limit, Some(Limit::Descriptors));
    }

    #[test]
    fn one_that_is_lost_unverified_or_missing_is_short() {
        let mut lost = stats(10);
        lost.lost = 1;
        let mut unverified = stats(10);
        unverified.verified_passes = vec![10, 9];
        let mut once = stats(10);
        once.verified_passes = vec![10];
        for stats in [lost, unverified, once, stats(9)] {
            assert_eq!(judge(&asked(10), &stats, to()).verdict, Verdict::Short, "{stats:?}");
        }
    }

    #[test]
    fn a_full_server_lowers_a_target_that_was_not_given() {
        let mut full = stats(7);
        (full.stop, full.failed) = (Some(Stop::ServerFull), 3);
        let outcome = judge(&left_out(10), &full, to());
        assert_eq!((outcome.target, outcome.verdict), (7, Verdict::Reached));
        assert_eq!(outcome.failed, 0);
        assert_eq!(outcome.limit, Some(Limit::Server));
        let outcome = judge(&asked(10), &full, to());
        assert_eq!((outcome.target, outcome.verdict), (10, Verdict::Short));
        assert_eq!(outcome.failed, 3);
        assert!(outcome.detail.unwrap().contains("the server was the cap"));
    }

    #[test]
    fn a_limit_of_the_client_is_named_beside_that_of_the_server() {
        for stop in [Stop::ServerFull, Stop::ServerSilent, Stop::Memory(Errno::ENOMEM)] {
            let mut full = stats(7);
            (full.stop, full.failed) = (Some(stop), 3);
            let detail = |target: &Target| judge(target, &full, to()).detail.unwrap();
            let both = detail(&left_out(10));
            assert!(both.ends_with("; the client's own limit is next: 19 of 1,000"), "{both}");
            assert!(!detail(&asked(10)).contains("is next"));
        }
        let mut own = stats(7);
        own.stop = Some(Stop::Descriptors(Errno::EMFILE));
        let detail = judge(&left_out(10), &own, to()).detail.unwrap();
        assert!(!detail.contains("is next"), "it is the same one: {detail}");
        (own.stop, own.peak) = (Some(Stop::ServerFull), 0);
        let detail = judge(&left_out(10), &own, to()).detail.unwrap();
        assert!(!detail.contains("is next"), "nothing was held: {detail}");
    }

    #[test]
    fn a_server_that_is_full_before_the_first_connection_is_a_failure() {
        let mut full = stats(0);
        full.stop = Some(Stop::ServerFull);
        assert_eq!(judge(&left_out(10), &full, to()).verdict, Verdict::Short);
    }

    #[test]
    fn skipping_the_echo_is_advised_where_it_helps() {
        for stop in [Stop::ServerFull, Stop::ServerSilent] {
            let mut nothing = stats(0);
            nothing.stop = Some(stop);
            let detail = |stats: &RunStats| judge(&asked(10), stats, to()).detail.unwrap();
            assert!(detail(&nothing).contains("--no-verify"));
            nothing.verified_passes = vec![];
            assert!(!detail(&nothing).contains("echo"), "{}", detail(&nothing));
        }
    }

    #[test]
    fn losing_most_connections_comes_before_other_reasons() {
        for stop in [None, Some(Stop::ServerFull), Some(Stop::ServerGone)] {
            let mut gone = stats(10);
            gone.stop = stop;
            (0..10).for_each(|_| gone.lose_one(None));
            let outcome = judge(&left_out(10), &gone, to());
            assert_eq!((outcome.verdict, outcome.limit), (Verdict::Short, Some(Limit::Server)));
            assert!(outcome.detail.unwrap().contains("10 of 10 connections lost"));
        }
    }

    #[test]
    fn a_signal_is_never_a_success() {
        let mut cut = stats(10);
        cut.stop = Some(Stop::Interrupted);
        let outcome = judge(&asked(10), &cut, to());
        assert_eq!((outcome.verdict, outcome.limit), (Verdict::Short, Some(Limit::Interrupted)));
    }

    #[test]
    fn a_few_attempts_that_all_failed_are_named_by_their_failure() {
        for (errno, limit, part) in [
            (Errno::ENETUNREACH, Limit::Network, "ENETUNREACH"),
            (Errno::ETIMEDOUT, Limit::Network, "ETIMEDOUT"),
            (Errno::EBADMSG, Limit::Server, "no echo server"),
        ] {
            let mut nothing = stats(0);
            nothing.failed = 1;
            nothing.failures.count_errno(errno);
            let outcome = judge(&asked(1), &nothing, to());
            assert_eq!((outcome.verdict, outcome.limit), (Verdict::Short, Some(limit)));
            assert!(outcome.detail.unwrap().contains(part), "{errno}");
        }
    }

    #[test]
    fn reserved_ports_are_named_where_ports_run_out() {
        let mut out = stats(10);
        (out.stop, out.failed) = (Some(Stop::Ports), 1);
        let target = Target { local_ports_reserved: 500, ..asked(11) };
        let detail = judge(&target, &out, to()).detail.unwrap();
        assert!(detail.contains("500 more are reserved (net.ipv4.ip_local_reserved"), "{detail}");
        assert!(!judge(&asked(11), &out, to()).detail.unwrap().contains("reserved"));
    }

    fn of_target(last: u8, held: u64, stop: Option<Stop>) -> TargetStats {
        let to = Destination::new(([127, 0, 0, last], 9900), 100);
        TargetStats { held, peak: held, opened: held, stop, ..TargetStats::new(to) }
    }

    #[test]
    fn a_target_that_is_down_is_named_and_the_run_is_short() {
        let mut stats = stats(5);
        stats.failed = 3;
        stats.targets = vec![of_target(1, 5, None), of_target(2, 0, Some(Stop::NothingListens))];
        let outcome = judge(&asked(10), &stats, to());
        assert_eq!((outcome.verdict, outcome.limit), (Verdict::Short, Some(Limit::Server)));
        let detail = outcome.detail.unwrap();
        let start = "nothing listens on 127.0.0.2:9900-9999: start";
        assert!(detail.starts_with(start), "{detail}");
        assert!(!detail.contains("127.0.0.1"), "{detail}");
    }

    #[test]
    fn a_limit_of_one_target_lowers_the_goal_and_a_fault_of_one_does_not() {
        let of = |run: Option<Stop>, first: Option<Stop>| {
            let mut stats = stats(7);
            (stats.stop, stats.failed) = (run, 3);
            stats.targets = vec![of_target(1, 2, first), of_target(2, 5, None)];
            stats.targets[0].failed = 3;
            stats
        };
        let (full, down) = (Some(Stop::ServerFull), Some(Stop::NothingListens));
        let unasked = Target { is_asked: false, ..asked(10) };
        let outcome = judge(&unasked, &of(None, full), to());
        assert_eq!((outcome.target, outcome.failed, outcome.verdict), (7, 0, Verdict::Reached));
        assert_eq!(outcome.limit, Some(Limit::Server));
        assert_eq!(judge(&asked(10), &of(None, full), to()).verdict, Verdict::Short);
        assert_eq!(judge(&unasked, &of(None, down), to()).target, 10);
        let mut other = of(None, full);
        other.targets[1].failed = 1;
        assert_eq!(judge(&unasked, &other, to()).verdict, Verdict::Short);
        let both = judge(&unasked, &of(Some(Stop::Descriptors(Errno::EMFILE)), down), to());
        assert_eq!((both.target, both.limit), (10, Some(Limit::Descriptors)));
        let detail = both.detail.unwrap();
        assert!(detail.contains("; nothing listens on 127.0.0.1:9900-9999"), "{detail}");
    }

    #[test]
    fn losses_are_named_by_target() {
        let mut stats = stats(10);
        stats.targets = vec![of_target(1, 5, None), of_target(2, 5, None)];
        for _ in 0..5 {
            stats.lose_one(None);
            stats.targets[1].lose_one();
        }
        assert!(!stats.has_lost_most(), "the first target has lost none");
        let detail = judge(&asked(10), &stats, to()).detail.unwrap();
        let part = "5 of 10 connections lost (EOF 5) (127.0.0.2:9900-9999: 5)";
        assert!(detail.contains(part), "{detail}");
    }

    #[test]
    fn the_fault_of_a_unix_domain_socket_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str, stop| {
            let to = Destination::new(folder.path().join(name), 1);
            sentence(stop, 0, &asked(1), &stats(0), &[to])
        };
        std::fs::write(folder.path().join("file"), "").unwrap();
        let listener = std::os::unix::net::UnixListener::bind(folder.path().join("stale"));
        drop(listener.unwrap());
        for (name, stop, part) in [
            ("file", Stop::NothingListens, "is no socket"),
            ("stale", Stop::NothingListens, "is left from a server that has ended"),
            ("gone", Stop::NothingListens, "start the server first"),
            ("gone", Stop::Network(Errno::ENOENT), "there is no socket at unix:/"),
            ("shut", Stop::Network(Errno::EACCES), "write permission for the socket"),
            ("datagram", Stop::Network(Errno::EPROTOTYPE), "SOCK_STREAM"),
            ("full", Stop::BacklogFull, "stayed full at 0 connections (EAGAIN)"),
            ("full", Stop::ServerFull, "drops every connection before its echo"),
        ] {
            let line = of(name, stop);
            assert!(line.contains(part) && !line.contains("ports"), "{line}");
        }
    }
}
