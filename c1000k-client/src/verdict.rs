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

/// The number of targets whose stop is explained; the others are only counted.
const SENTENCES_MAX: usize = 3;

/// The outcome of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The requested connections; without a request, those that the limits and the server allowed.
    pub(crate) target: u64,
    /// Requested connections that failed permanently.
    pub(crate) failed: u64,
    pub(crate) verdict: Verdict,
    pub(crate) limit: Option<Limit>,
    /// What limited the run, and the remedy, in one line.
    pub(crate) detail: Option<String>,
}

/// Judges a completed run to these destinations.
pub(crate) fn judge(target: &Target, stats: &RunStats, to: &[Destination]) -> Outcome {
    let (limit, detail) = match cap(target, stats, to) {
        Some((limit, detail)) => (Some(limit), Some(detail)),
        None if stats.lost > 0 => (Some(limit_of_losses(stats)), Some(losses(stats))),
        None => (None, None),
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
    // Connections that a full server dropped beyond a lowered target are not part of it.
    let failed = stats.failed.min(target.saturating_sub(stats.peak));
    Outcome { target, failed, verdict, limit, detail }
}

/// Whether limits have lowered the number of connections, which they do only if none was requested. A fault does not
/// lower it, nor do failed connections to a server that was not stopped.
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

/// Whether each pass verified all connections, if there were passes.
fn is_verified(stats: &RunStats, target: u64) -> bool {
    let passes = &stats.verified_passes;
    passes.is_empty() || (passes.len() == 2 && passes.iter().all(|&verified| verified >= target))
}

fn cap(target: &Target, stats: &RunStats, to: &[Destination]) -> Option<(Limit, String)> {
    let stop = match stats.stop {
        Some(Stop::Interrupted) => stats.stop,
        _ if stats.has_lost_most() || is_not_back(stats) => {
            return Some((limit_of_losses(stats), losses(stats)));
        }
        None if stats.peak == 0 && stats.unanswered > 0 => Some(Stop::ServerSilent),
        None if stats.peak == 0 && stats.failed > 0 => Some(stop_of_last_failure(stats)),
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

/// Whether connections could not be reopened, for a reason that is not in this machine.
fn is_not_back(stats: &RunStats) -> bool {
    let is_elsewhere = |stop| matches!(limit_of(stop), Limit::Server | Limit::Network);
    stats.losses.has(failures::NOT_BACK) && stats.stop.is_none_or(is_elsewhere)
}

/// The limit of this machine that would be reached next: raising only the one that was reached helps little.
fn next_limit(stop: Stop, target: &Target, stats: &RunStats) -> String {
    match &target.cap {
        Some(cap) if stop.is_limit() && stats.peak > 0 && cap.limit != limit_of(stop) => {
            format!("; the client's own limit is next: {}", cap.detail)
        }
        _ => String::new(),
    }
}

/// The failure of the last attempt, if all failed and they were too few to end the ramp.
fn stop_of_last_failure(stats: &RunStats) -> Stop {
    match stats.failures.last() {
        Some(Errno::EBADMSG) => Stop::NotAnEcho,
        Some(errno) => Stop::Network(errno),
        None => Stop::Network(Errno::ETIMEDOUT),
    }
}

/// Which of several targets were stopped, and why; `None` if none was.
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

/// The share of each of several targets in a figure, without zeros: ` (127.0.0.1:9900: 7)`.
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

/// Why no more connections to these destinations were opened, of which `peak` were held, and the remedy.
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
    let not_expected = not_expected(stats);
    match stop {
        Stop::Descriptors(Errno::EMFILE) if target.file_table == FileTable::Registered => {
            format!(
                "descriptors ran out at {held} (EMFILE): no further table of registered files could be created; to open \
             more, raise ulimit -l, which client and server of one user share, or ulimit -n"
            )
        }
        Stop::Descriptors(errno) => format!(
            "descriptors ran out at {held} ({errno:?}); to open more, \
             raise ulimit -n, or fs.file-max if the whole system has too few"
        ),
        Stop::Memory(errno) => format!(
            "the kernel has no memory for more than {held} ({errno:?}); to open more, \
             add memory, or raise net.ipv4.tcp_mem or the cgroup's limit"
        ),
        Stop::Watches => format!(
            "epoll watches ran out at {held} (ENOSPC); to open more, \
             raise fs.epoll.max_user_watches"
        ),
        Stop::Ports if peak == 0 => format!(
            "no local port is free for {to} (EADDRNOTAVAIL){}: other connections to it use them; \
             use more ports (--ports), another --source, or a wider net.ipv4.ip_local_port_range",
            reserved(target)
        ),
        Stop::Ports => format!(
            "local ports ran out at {held} (EADDRNOTAVAIL){}; to open more, use more source addresses \
             (--source), more ports (--ports), or a wider net.ipv4.ip_local_port_range",
            reserved(target)
        ),
        Stop::NoAddress => format!(
            "this machine has no address from which it can reach {to} (EADDRNOTAVAIL): see `ip address`, \
             and for IPv6 net.ipv6.conf.*.disable_ipv6"
        ),
        Stop::ServerFull if peak == 0 && stats.verified().is_none() => format!(
            "the server on {to} drops every connection at once: it is full, or refuses every client; \
             see its log"
        ),
        Stop::ServerFull if peak == 0 && stats.has_answers_in_part() => format!(
            "the server on {to} ends every connection after a part of its {answer}: it is \
             {not_expected}, or fails; see its log"
        ),
        Stop::ServerFull if peak == 0 => format!(
            "the server on {to} drops every connection before its {answer}: it is full, or {not_expected}"
        ),
        Stop::ServerFull => format!(
            "the server was the limit: it dropped every connection beyond {held}; to open more, \
             raise its limit (ulimit -n, --max-connections) on its machine"
        ),
        Stop::ServerSilent if peak == 0 && stats.verified().is_none() => {
            format!("the server on {to} accepts no connection or does not answer; see its log")
        }
        Stop::ServerSilent if peak == 0 && stats.has_answers_in_part() => format!(
            "the server on {to} sends only a part of the {answer}: it is {not_expected}, or \
             slow; a longer --connect-timeout may help"
        ),
        Stop::ServerSilent if peak == 0 => format!(
            "the server on {to} accepts connections and does not answer: it hangs, or is {not_expected}"
        ),
        Stop::ServerSilent if is_verified(stats, peak) => format!(
            "the server was the limit: it answered {held} and none of the others; to open more, \
             raise its limit (ulimit -n) on its machine"
        ),
        Stop::ServerSilent => {
            format!("the server stopped answering at {held}; see its log and its memory")
        }
        Stop::NotAnEcho if !is_echo(stats) => {
            format!("the server on {to} is {not_expected}")
        }
        Stop::NotAnEcho => format!(
            "the server on {to} returns bytes that differ from those sent: it is not an echo server; \
             --no-verify skips the echo"
        ),
        Stop::NothingListens => format!(
            "nothing listens on {to}: start c1000k-server there first, or specify the port and \
             --ports of a running server"
        ),
        Stop::ServerGone => format!(
            "nothing listens on {to} any more: the server closed its ports at {held}; \
             see its log"
        ),
        Stop::Network(errno) if peak == 0 => format!(
            "no connection to {to} could be opened ({errno:?}): check the address, the route and \
             firewalls between client and server"
        ),
        Stop::Network(errno) => format!(
            "the network allowed no more than {held} ({errno:?}): check the route, \
             firewalls between client and server, nf_conntrack_max, and whether the server still accepts"
        ),
        Stop::BacklogFull => format!(
            "the backlog of {to} stayed full at {held} (EAGAIN): the server does not accept; see its log"
        ),
        Stop::Interrupted => {
            format!(
                "a signal ended the run early, with {} held",
                format::counted(stats.held, "connection")
            )
        }
    }
}

/// The sentence for a Unix-domain socket; `None` if the one for TCP applies.
fn unix_sentence(stop: Stop, peak: u64, to: &Destination) -> Option<String> {
    let is_file_of = |of: fn(&Path) -> bool| to.path().is_some_and(of);
    Some(match stop {
        Stop::NothingListens if is_file_of(|path| path.exists() && !is_socket(path)) => {
            format!(
                "{to} is not a socket: specify the path of the socket that the server listens on"
            )
        }
        Stop::NothingListens if is_file_of(is_socket) => format!(
            "nothing listens on {to} (ECONNREFUSED): the socket is left over from a server that has ended; start the \
             server"
        ),
        Stop::NothingListens => format!("nothing listens on {to}: start the server first"),
        Stop::ServerGone => format!(
            "nothing listens on {to} any more: the server closed its socket at {}; see its log",
            format::counted(peak, "connection")
        ),
        Stop::Network(Errno::ENOENT | Errno::ENOTDIR) => format!(
            "there is no socket at {to}: start the server first, or specify the path of its socket"
        ),
        Stop::Network(Errno::EACCES | Errno::EPERM) => format!(
            "no permission to connect to {to} (EACCES): this requires write permission for the socket, and search \
             permission for its directories"
        ),
        Stop::Network(Errno::EPROTOTYPE) => format!(
            "{to} is not a stream socket (EPROTOTYPE): specify the path of a socket of type SOCK_STREAM"
        ),
        Stop::Network(errno) => format!(
            "no connection to {to} could be opened ({errno:?}): see the path and the server's log"
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

/// What a server is that does not answer as expected.
fn not_expected(stats: &RunStats) -> String {
    if is_echo(stats) {
        return "not an echo server (--no-verify skips the echo)".to_owned();
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

/// Explains the lost connections by their most frequent failure.
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
    let reopening = stats.failures_of_reopening();
    let lost = match stats.losses.has(failures::NOT_BACK) && !reopening.by_name().is_empty() {
        true => format!("{lost}; attempts to open them again failed ({reopening})"),
        false => lost,
    };
    match seen(stats) {
        Seen::Gone => {
            format!("the server went away, and nothing listens any more: {lost}; see its log")
        }
        Seen::OtherBytes if !is_echo(stats) => {
            format!("the server's answer was {}: {lost}", not_expected(stats))
        }
        Seen::OtherBytes => format!(
            "the server returned bytes that differ from those sent: {lost}; it is not an echo server, or \
             confuses its connections (--no-verify skips the echo)"
        ),
        Seen::Silence if stats.lost_in_part * 2 > stats.lost => format!(
            "the server sent only a part of the {answer}: {lost}; it hangs, or the network path has \
             failed: see its log and its memory"
        ),
        Seen::Silence => format!(
            "the server stopped answering: {lost}; it hangs, or the network path has failed: see its \
             log and its memory"
        ),
        Seen::Closed if stats.peak * 2 <= stats.opened => format!(
            "the server closes connections soon after they open: {lost}, and at most \
             {most_at_once} were held at once; see its log and its idle timeout"
        ),
        Seen::Closed if stats.has_lost_most() => format!(
            "most connections were lost: {lost}; the server closed them: see its log (out of memory? an idle \
             timeout?)"
        ),
        Seen::Closed => format!(
            "{lost}: the server closed them (an idle timeout?), or a device on the path did"
        ),
        Seen::Failed => {
            format!("the network path has failed: {lost}; check the route and its firewalls")
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
    /// The server has ended: nothing listens any more.
    Gone,
    /// An error of the network.
    Failed,
}

fn seen(stats: &RunStats) -> Seen {
    let reopening = stats.failures_of_reopening();
    let is_gone = reopening.has("ECONNREFUSED");
    let most = match stats.losses.most() {
        // Connections that are not back are explained by the attempts to reopen them.
        Some(failures::NOT_BACK) => Some(reopening.most().unwrap_or("ETIMEDOUT")),
        most => most,
    };
    match most {
        Some("ECONNREFUSED") => Seen::Gone,
        Some("EBADMSG") => Seen::OtherBytes,
        Some("ETIMEDOUT" | "ECANCELED") => Seen::Silence,
        Some(failures::EOF | "ECONNRESET" | "ECONNABORTED" | "EPIPE") if is_gone => Seen::Gone,
        Some(failures::EOF | "ECONNRESET" | "ECONNABORTED" | "EPIPE") => Seen::Closed,
        _ => Seen::Failed,
    }
}

fn limit_of_losses(stats: &RunStats) -> Limit {
    if let Seen::Failed = seen(stats) { Limit::Network } else { Limit::Server }
}

/// The limit and the sentence of a run in which some connections failed.
fn failed(stats: &RunStats) -> (Limit, String) {
    let failed = format!(
        "failed: {}{}",
        format::counted(stats.failed, "connection"),
        by_target(stats, |target| target.failed)
    );
    let failures = &stats.failures;
    if failures.most() == Some("EBADMSG") {
        let reason = if is_echo(stats) {
            "the server returned bytes that differ from those sent".to_owned()
        } else {
            format!("the server is {}", not_expected(stats))
        };
        return (Limit::Server, format!("{failed} ({failures}): {reason}"));
    }
    let limit = if stats.unanswered > 0 { Limit::Server } else { Limit::Network };
    let remedy = if failures.has("ETIMEDOUT") {
        "a longer --connect-timeout or fewer --in-flight may help"
    } else {
        "check the route and its firewalls"
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
        assert!(outcome.detail.unwrap().contains("the server was the limit"));
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
    fn the_servers_own_words_are_quoted_where_some_were_held() {
        let mut full = stats(5);
        (0..15).for_each(|_| full.failures.count_errno(Errno::EBADMSG));
        full.failed = 15;
        full.expected = "a PONG";
        full.complaint = Some("it sent \"-ERR max number of clients reached\"".to_owned());
        let outcome = judge(&asked(20), &full, to());
        assert_eq!(outcome.limit, Some(Limit::Server));
        let detail = outcome.detail.unwrap();
        assert!(detail.contains("(a PONG; it sent \"-ERR max number of clients"), "{detail}");
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
            (Errno::EBADMSG, Limit::Server, "not an echo server"),
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
            ("file", Stop::NothingListens, "is not a socket"),
            ("stale", Stop::NothingListens, "is left over from a server that has ended"),
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
