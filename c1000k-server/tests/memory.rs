//! The memory guard in a memory cgroup, seen from outside: the server finds its limit, whatever is visible in `/proc`
//! and `/sys`, and is not killed.
//!
//! Only root can make a cgroup and hide files; otherwise these tests are skipped.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{
    DEADLINE, Server, can_mount, echo, in_new_mounts, is_refused, skip, try_connect, until,
};

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 10 * MIB;
const PORTS: u16 = 4;

/// The mount point of version 1.
const TOP_1: &str = "/sys/fs/cgroup/memory";

/// More than fit into [`LIMIT`], at about 1.5 KB each.
const CROWD: usize = 7_500;

/// A memory cgroup of version 1 or 2, whichever this machine has; removed at the end.
struct MemoryCgroup {
    directory: PathBuf,
    is_version_1: bool,
}

impl MemoryCgroup {
    /// `None`, with a message, if none can be made.
    fn new(what: &str, name: &str) -> Option<Self> {
        let version_1 = Path::new(TOP_1);
        let is_version_1 = version_1.is_dir();
        let top = if is_version_1 { version_1 } else { Path::new("/sys/fs/cgroup") };
        let group = Self {
            directory: top.join(format!("c1000k-test-{}-{name}", std::process::id())),
            is_version_1,
        };
        match fs::create_dir(&group.directory).and_then(|()| group.limit(LIMIT)) {
            Ok(()) => Some(group),
            Err(error) => {
                skip(what, &format!("no memory cgroup can be made here: {error}"));
                None
            }
        }
    }

    /// A group in it, without a limit.
    fn inner(&self) -> Self {
        let inner =
            Self { directory: self.directory.join("inner"), is_version_1: self.is_version_1 };
        fs::create_dir(&inner.directory).unwrap();
        inner
    }

    fn limit(&self, bytes: u64) -> std::io::Result<()> {
        let file = if self.is_version_1 { "memory.limit_in_bytes" } else { "memory.max" };
        fs::write(self.directory.join(file), bytes.to_string())
    }

    /// The commands of a shell that enters it, and becomes the first to be killed if memory runs out.
    fn enter(&self) -> String {
        let members = self.directory.join("cgroup.procs");
        format!("echo $$ >{} && echo 1000 >/proc/self/oom_score_adj &&", members.display())
    }

    fn kills(&self) -> u64 {
        let file = if self.is_version_1 { "memory.oom_control" } else { "memory.events" };
        self.value(file, "oom_kill").unwrap_or(0)
    }

    fn value(&self, file: &str, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.directory.join(file)).ok()?;
        text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        until(DEADLINE, || fs::remove_dir(&self.directory).is_ok());
    }
}

/// Connects until some are refused, and holds the admitted ones.
fn flood(server: &mut Server) -> Vec<TcpStream> {
    let mut crowd: Vec<TcpStream> = Vec::new();
    while crowd.len() < CROWD && server.lines_with("further connections are refused").is_empty() {
        let connects = (0..100).filter_map(|index| try_connect(server.address(index % PORTS)));
        crowd.extend(connects);
    }
    crowd.into_iter().filter(|stream| !is_refused(stream)).collect()
}

/// More connect than fit: the guard closes in time, the server keeps its connections and is not killed.
fn assert_it_keeps_within(group: &MemoryCgroup, mut server: Server) {
    let held = flood(&mut server);
    assert!(server.sees_line("further connections are refused"));
    assert!((2_000..CROWD).contains(&held.len()), "{} are held", held.len());
    for stream in held.iter().step_by(100) {
        echo(stream, b"still held");
    }
    drop(held);
    let record = server.stop();
    assert_eq!(group.kills(), 0, "{record:?}");
    let guard = record.memory_guard.unwrap();
    assert!(guard.room_min_bytes > guard.reserve_bytes / 4, "{guard:?}");
}

#[test]
fn a_cgroup_binds_where_proc_shows_processes_only() {
    const WHAT: &str = "the test of a /proc with subset=pid";
    const FRESH_PROC: &str = "mount -t proc -o subset=pid proc /proc";
    let Some(group) = MemoryCgroup::new(WHAT, "subset") else { return };
    if !can_mount(WHAT, FRESH_PROC) {
        return;
    }
    let prelude = format!("{} {}", group.enter(), in_new_mounts(FRESH_PROC));
    let server = Server::start_by(&prelude, PORTS, &["--memory-reserve", "1M"]);
    assert_it_keeps_within(&group, server);
}

#[test]
fn a_cgroup_binds_where_a_fresh_sys_hides_its_files() {
    const WHAT: &str = "the test of a fresh /sys";
    // Like `ip netns exec`.
    const FRESH_SYS: &str = "umount -l /sys && mount -t sysfs sysfs /sys";
    let Some(group) = MemoryCgroup::new(WHAT, "fresh") else { return };
    if !can_mount(WHAT, FRESH_SYS) {
        return;
    }
    let prelude = format!("{} {}", group.enter(), in_new_mounts(FRESH_SYS));
    let server = Server::start_by(&prelude, PORTS, &[]);
    assert_it_keeps_within(&group, server);
}

#[test]
fn a_limit_above_the_visible_part_of_a_container_binds() {
    const WHAT: &str = "the test of a limit above the container";
    let Some(outer) = MemoryCgroup::new(WHAT, "outer") else { return };
    if !outer.is_version_1 {
        return skip(WHAT, "version 2 has no file with it");
    }
    let inner = outer.inner();
    let folder = tempfile::tempdir().unwrap();
    let only_inner = format!(
        "mount --bind {} {folder} && umount -l {TOP_1} && mount --move {folder} {TOP_1}",
        inner.directory.display(),
        folder = folder.path().display()
    );
    if !can_mount(WHAT, &only_inner) {
        return;
    }
    let prelude = format!("{} {}", inner.enter(), in_new_mounts(&only_inner));
    assert_it_keeps_within(&inner, Server::start_by(&prelude, PORTS, &[]));
    assert_eq!(outer.kills(), 0);
}

#[test]
fn active_page_cache_is_room() {
    const WHAT: &str = "the test of active page cache";
    const CACHED: u64 = 24 * MIB;
    let Some(group) = MemoryCgroup::new(WHAT, "cache") else { return };
    // Large enough that the kernel reclaims nothing: it would make the cache inactive first.
    group.limit(2 * CACHED).unwrap();
    let folder = tempfile::tempdir_in(".").unwrap();
    let file = folder.path().join("cached");
    fs::write(&file, vec![1; CACHED as usize]).unwrap();
    // Page cache is charged to the group that read it first, so it is dropped before the group reads it.
    let (file, text) = (file.display(), "dd bs=4k of=/dev/null status=none");
    let reads = format!(
        "sync {file} && dd if={file} iflag=nocache count=0 status=none && for i in 1 2 3 4; do {text} if={file}; done"
    );
    let read = format!("{} {reads}", group.enter());
    assert!(Command::new("sh").args(["-c", &read]).status().unwrap().success());
    let key = if group.is_version_1 { "total_active_file" } else { "active_file" };
    let active = group.value("memory.stat", key).unwrap_or(0);
    if active < CACHED / 8 * 7 {
        return skip(WHAT, &format!("{active} bytes of the page cache are active here"));
    }
    // Without the cache there is less than this.
    let server = Server::start_by(&group.enter(), 1, &["--memory-reserve", "32M"]);
    let held: Vec<TcpStream> = (0..200).map(|_| server.connect(0)).collect();
    common::echo_all(&held, b"there is room for all");
    assert_eq!((server.stop().refused, group.kills()), (0, 0));
}

#[test]
fn memory_that_can_not_be_read_is_warned_of_once() {
    const WHAT: &str = "the test of a machine without meminfo";
    const BARE: &str = "mount -t proc -o subset=pid proc /proc && mount -t tmpfs none /sys";
    if !can_mount(WHAT, BARE) {
        return;
    }
    let mut server = Server::start_by(&in_new_mounts(BARE), 1, &["--memory-reserve", "1G"]);
    let stream = server.connect(0);
    echo(&stream, b"admitted all the same");
    assert!(server.sees_line(" 1 connection |"));
    let lines = server.lines_with("--memory-reserve is not kept");
    assert!(lines.len() == 1 && lines[0].contains("WARN"), "{lines:?}");
    assert_eq!(server.stop().memory_guard, None);
}
