//! Memory limits of the cgroups around this process, versions 1 and 2.
//!
//! A limit anywhere on the way up to the root of the hierarchy binds all that is below it. Which
//! files are read is settled once; a process that is moved to another group keeps being measured
//! by the first.
//!
//! The process's own mounts need not show its group: `ip netns exec`, for one, mounts a fresh `/sys`.
//! Then the mounts of the processes that started it are tried, and where none of them shows the
//! group either, [`Cgroups::hidden`] names it.

use {
    super::{pinned_bytes, total},
    crate::text,
    procfs::{
        FromRead, ProcessCGroups,
        process::{MountInfo, MountInfos},
    },
    std::{
        fs::{self, File},
        iter,
        os::fd::AsRawFd,
        path::{Component, Path, PathBuf},
        sync::Arc,
    },
};

/// A limit of 2^62 or more is the kernel's way to say that there is none.
const UNLIMITED_BYTES: u64 = 1 << 62;

/// The most generations of parents whose mounts are read.
const ANCESTORS_MAX: usize = 32;

/// Every group has this file, whatever it limits.
const MEMBERS: &str = "cgroup.procs";

/// Mapped page cache is what programs run from: as much as this part of the limit is not counted as reclaimable.
const MAPPED_KEPT_DIVISOR: u64 = 8;

/// One cgroup that has a memory limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupLimit {
    /// The group's directory.
    pub directory: PathBuf,
    /// Past this the group's processes are throttled or killed.
    pub limit_bytes: u64,
    /// What the group and all groups below it use.
    pub used_bytes: u64,
    /// The part of it that the kernel takes back before it kills: page cache, and slabs that can shrink.
    pub reclaimable_bytes: u64,
    /// The part of it that is data queued in sockets; `None` where that is not charged to the group.
    pub socket_data_bytes: Option<u64>,
}

impl CgroupLimit {
    /// What may still be taken.
    pub fn room_bytes(&self) -> u64 {
        let held_bytes = self.used_bytes.saturating_sub(self.reclaimable_bytes);
        self.limit_bytes.saturating_sub(held_bytes)
    }
}

/// The cgroups that count this process's memory, innermost first.
#[derive(Clone, Debug, Default)]
pub struct Cgroups {
    groups: Vec<Group>,
    hidden: Option<PathBuf>,
}

#[derive(Clone, Debug)]
struct Group {
    directory: PathBuf,
    /// Where its files are read, if not in the directory: another process's mounts vanish with that process.
    held_open: Option<Arc<File>>,
    files: &'static Files,
    /// It is the highest one that can be seen, so what binds above it is to be asked here.
    is_outermost: bool,
}

/// The names that a version of the interface uses.
#[derive(Debug, PartialEq, Eq)]
struct Files {
    /// Each of these limits.
    limits: &'static [&'static str],
    used: &'static str,
    /// The keys in `memory.stat`, groups below included: the lowest limit of the group and all above it.
    limit_from_above: Option<&'static str>,
    /// Page cache, used lately or not.
    page_cache: &'static [&'static str],
    mapped: &'static str,
    /// Slabs that can shrink. Version 1 has no such key.
    slabs: Option<&'static str>,
    /// Data in sockets. Version 1 counts that elsewhere, and by default not at all.
    socket_data: Option<&'static str>,
}

const VERSION_1: Files = Files {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    limit_from_above: Some("hierarchical_memory_limit"),
    page_cache: &["total_inactive_file", "total_active_file"],
    mapped: "total_mapped_file",
    slabs: None,
    socket_data: None,
};

const VERSION_2: Files = Files {
    // Above `high` the group is throttled until it is of no use: that binds as `max` does.
    limits: &["memory.max", "memory.high"],
    used: "memory.current",
    limit_from_above: None,
    page_cache: &["inactive_file", "active_file"],
    mapped: "file_mapped",
    slabs: Some("slab_reclaimable"),
    socket_data: Some("sock"),
};

impl Cgroups {
    /// The groups of this process; none where they can't be determined.
    pub fn of_self() -> Self {
        let Some(cgroups) = text::read("/proc/self/cgroup") else { return Self::default() };
        let own = text::read("/proc/self/mountinfo").unwrap_or_default();
        let groups = own_view(&cgroups, &own);
        if !groups.is_empty() {
            return Self { groups, hidden: None };
        }
        match ancestors().find_map(|process| view_of(&process, &cgroups)) {
            Some(groups) => Self { groups, hidden: None },
            None => Self { groups, hidden: hidden_group(&cgroups, is_namespaced()) },
        }
    }

    /// The process's group, where it counts memory and none of its files can be read.
    pub fn hidden(&self) -> Option<&Path> {
        self.hidden.as_deref()
    }

    /// The limits that are set, with what is used of them now, on a system with `tcp_sockets` sockets.
    pub fn limits(&self, tcp_sockets: u64) -> impl Iterator<Item = CgroupLimit> {
        self.groups.iter().filter_map(move |group| group.limit(tcp_sockets))
    }
}

/// The groups that this process sees in its own mounts.
fn own_view(cgroups: &str, mounts: &str) -> Vec<Group> {
    let mut groups = parse(cgroups, mounts, Outside::IsMountPoint);
    groups.retain(|group| group.directory.join(MEMBERS).exists());
    groups
}

/// The groups of this process that another one sees, held open: they are read by way of its root.
fn view_of(process: &Path, cgroups: &str) -> Option<Vec<Group>> {
    let mounts = text::read(process.join("mountinfo"))?;
    let groups = parse(cgroups, &mounts, Outside::IsUnknown);
    let root = process.join("root");
    let opened = groups.into_iter().filter_map(|group| {
        let below = group.directory.strip_prefix("/").ok()?;
        let directory = root.join(below);
        let held_open = directory.join(MEMBERS).exists().then(|| File::open(&directory).ok())??;
        Some(Group { held_open: Some(Arc::new(held_open)), ..group })
    });
    Some(opened.collect()).filter(|groups: &Vec<Group>| !groups.is_empty())
}

/// The processes that started this one, as their directories in `/proc`.
fn ancestors() -> impl Iterator<Item = PathBuf> {
    let directory = |process: u64| PathBuf::from(format!("/proc/{process}"));
    let parent = move |of: &Path| {
        let status = text::read(of.join("status"))?;
        text::value_of(&status, "PPid:").filter(|&process| process > 0)
    };
    let first = parent(Path::new("/proc/self"));
    iter::successors(first, move |&process| parent(&directory(process)))
        .take(ANCESTORS_MAX)
        .map(directory)
}

/// Whether the root of the hierarchy, as this process sees it, is some group of the system's.
fn is_namespaced() -> bool {
    let namespace = fs::read_link("/proc/self/ns/cgroup");
    namespace.is_ok_and(|namespace| namespace != Path::new(FIRST_CGROUP_NAMESPACE))
}

/// The kernel gives it this number (`PROC_CGROUP_INIT_INO`).
const FIRST_CGROUP_NAMESPACE: &str = "cgroup:[4026531835]";

/// The group of a process that sees none of its groups' files; the system's root group has no limit.
fn hidden_group(cgroups: &str, is_namespaced: bool) -> Option<PathBuf> {
    let cgroups = ProcessCGroups::from_read(cgroups.as_bytes()).ok()?;
    let (path, _) = membership(&cgroups)?;
    (is_namespaced || path != "/").then(|| path.into())
}

/// What it means that a process's group lies outside of what is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outside {
    /// In a container: the mount point is all that can be seen, and it is the container's own group.
    IsMountPoint,
    /// In another process's mounts: some other group.
    IsUnknown,
}

fn parse(cgroups: &str, mounts: &str, outside: Outside) -> Vec<Group> {
    let Ok(cgroups) = ProcessCGroups::from_read(cgroups.as_bytes()) else { return Vec::new() };
    let Ok(mounts) = MountInfos::from_read(mounts.as_bytes()) else { return Vec::new() };
    let Some((path, files)) = membership(&cgroups) else { return Vec::new() };
    let of_memory = mounts.iter().filter(|mount| files_of(mount) == Some(files));
    let groups_of = |mount| {
        directories(mount, path, outside).map(move |directory| Group {
            is_outermost: directory == mount.mount_point,
            directory,
            held_open: None,
            files,
        })
    };
    of_memory.flat_map(groups_of).collect()
}

/// The process's group in the hierarchy that counts memory: the one of version 1 that has the controller, else version 2.
fn membership(cgroups: &ProcessCGroups) -> Option<(&str, &'static Files)> {
    let of = |is_it: fn(&[String]) -> bool| {
        cgroups.0.iter().find(|group| is_it(&group.controllers)).map(|group| &*group.pathname)
    };
    let version_1 = of(|controllers| controllers.iter().any(|name| name == "memory"));
    let version_2 = || of(<[String]>::is_empty);
    version_1.map(|path| (path, &VERSION_1)).or_else(|| version_2().map(|path| (path, &VERSION_2)))
}

impl Group {
    fn limit(&self, tcp_sockets: u64) -> Option<CgroupLimit> {
        let stat = text::read(self.file("memory.stat")).unwrap_or_default();
        let value = |key| text::value_of(&stat, key);
        let number = |name: &&str| text::read_number(self.file(name));
        let from_above = self.files.limit_from_above.filter(|_| self.is_outermost).and_then(value);
        let limit_bytes = self.files.limits.iter().filter_map(number).chain(from_above).min()?;
        if limit_bytes >= UNLIMITED_BYTES {
            return None;
        }
        let page_cache_bytes = total(self.files.page_cache.iter().filter_map(|key| value(key)));
        let mapped_bytes = value(self.files.mapped).unwrap_or(0);
        let slab_bytes = self.files.slabs.and_then(value).unwrap_or(0);
        let cache_bytes = reclaimable_cache_bytes(page_cache_bytes, mapped_bytes, limit_bytes);
        Some(CgroupLimit {
            directory: self.directory.clone(),
            limit_bytes,
            used_bytes: number(&self.files.used)?,
            reclaimable_bytes: cache_bytes
                .saturating_add(slab_bytes.saturating_sub(pinned_bytes(tcp_sockets))),
            socket_data_bytes: self.files.socket_data.map(|key| value(key).unwrap_or(0)),
        })
    }

    fn file(&self, name: &str) -> PathBuf {
        match &self.held_open {
            Some(held) => format!("/proc/self/fd/{}/{name}", held.as_raw_fd()).into(),
            None => self.directory.join(name),
        }
    }
}

/// Page cache that the kernel gives up for the asking, whether it was used lately or not.
fn reclaimable_cache_bytes(page_cache_bytes: u64, mapped_bytes: u64, limit_bytes: u64) -> u64 {
    page_cache_bytes.saturating_sub(mapped_bytes.min(limit_bytes / MAPPED_KEPT_DIVISOR))
}

/// The names used below this mount, if it is one that counts memory.
fn files_of(mount: &MountInfo) -> Option<&'static Files> {
    match mount.fs_type.as_str() {
        "cgroup2" => Some(&VERSION_2),
        "cgroup" if mount.super_options.contains_key("memory") => Some(&VERSION_1),
        _ => None,
    }
}

/// The directory of the process's group below this mount, and all above it up to the mount point.
fn directories(mount: &MountInfo, path: &str, outside: Outside) -> impl Iterator<Item = PathBuf> {
    let top = mount.mount_point.clone();
    let below = Path::new(path)
        .strip_prefix(&mount.root)
        .ok()
        .filter(|below| !below.components().any(|part| part == Component::ParentDir))
        // Collecting drops the slash that joining an empty path leaves at the end.
        .map(|below| top.join(below).components().collect::<PathBuf>());
    let start = below.or_else(|| (outside == Outside::IsMountPoint).then(|| top.clone()));
    let above = iter::successors(start, |directory| directory.parent().map(PathBuf::from));
    above.take_while(move |directory| directory.starts_with(&top))
}

#[cfg(test)]
mod tests {
    use {super::*, crate::text::tests::damaged, proptest::prelude::*};

    const MOUNTS_1: &str = "\
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const CGROUPS_1: &str = "9:name=systemd:/\n4:memory:/outer/inner\n3:cpuset:/\n0::/\n";

    fn directories_of(cgroups: &str, mounts: &str) -> Vec<String> {
        let groups = parse(cgroups, mounts, Outside::IsMountPoint);
        groups.iter().map(|group| group.directory.display().to_string()).collect()
    }

    #[test]
    fn the_own_group_and_all_above_it_are_found() {
        let expected = [
            "/sys/fs/cgroup/memory/outer/inner",
            "/sys/fs/cgroup/memory/outer",
            "/sys/fs/cgroup/memory",
        ];
        assert_eq!(directories_of(CGROUPS_1, MOUNTS_1), expected);

        let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let cgroups = "0::/system.slice/c1000k.service\n";
        let expected = [
            "/sys/fs/cgroup/system.slice/c1000k.service",
            "/sys/fs/cgroup/system.slice",
            "/sys/fs/cgroup",
        ];
        assert_eq!(directories_of(cgroups, mounts), expected);
    }

    #[test]
    fn in_a_container_the_mount_point_stands_for_the_group() {
        let bound = "30 23 0:26 /docker/c0 /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        assert_eq!(
            directories_of("0::/docker/c0/x\n", bound),
            ["/sys/fs/cgroup/x", "/sys/fs/cgroup"]
        );
        assert_eq!(directories_of("0::/elsewhere\n", bound), ["/sys/fs/cgroup"]);
        let namespaced = "30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        assert_eq!(directories_of("0::/../..\n", namespaced), ["/sys/fs/cgroup"]);
    }

    #[test]
    fn a_system_without_cgroups_has_none() {
        assert_eq!(directories_of("", ""), [""; 0]);
        assert_eq!(directories_of("garbage", "garbage"), [""; 0]);
        assert_eq!(directories_of(CGROUPS_1, "1 2 0:3 / / rw - ext4 /dev/vda rw\n"), [""; 0]);
    }

    #[test]
    fn another_processes_mounts_show_a_group_only_where_they_lead_to_it() {
        let directories = |mounts| parse("0::/a/b\n", mounts, Outside::IsUnknown).len();
        assert_eq!(directories("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"), 3);
        assert_eq!(directories("30 23 0:26 /other /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"), 0);
        assert_eq!(directories("30 23 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"), 0);
    }

    #[test]
    fn a_group_that_nobody_shows_is_named_unless_it_is_the_systems_root() {
        let hidden = |cgroups, is_namespaced| hidden_group(cgroups, is_namespaced);
        assert_eq!(hidden(CGROUPS_1, false), Some("/outer/inner".into()));
        assert_eq!(hidden("4:memory:/\n0::/x\n", false), None);
        assert_eq!(hidden("3:cpu:/x\n0::/y\n", false), Some("/y".into()));
        assert_eq!(hidden("0::/\n", false), None);
        assert_eq!(hidden("0::/\n", true), Some("/".into()));
        assert_eq!(hidden("garbage", true), None);
    }

    #[test]
    fn the_processes_that_started_this_one_are_found() {
        let found: Vec<_> = ancestors().collect();
        assert!(found.iter().all(|process| process.join("status").exists()), "{found:?}");
        assert!(found.len() < ANCESTORS_MAX, "{found:?}");
    }

    /// A directory with such files, read as a group of this version.
    fn group(name: &str, files: &'static Files, texts: &[(&str, &str)]) -> Option<CgroupLimit> {
        let own = format!("c1000k-host-cgroup-{}-{name}", std::process::id());
        let directory = std::env::temp_dir().join(own);
        fs::create_dir_all(&directory).expect("a new directory");
        for (file, text) in texts {
            fs::write(directory.join(file), text).expect("a new file");
        }
        let group =
            Group { directory: directory.clone(), held_open: None, files, is_outermost: true };
        let limit = group.limit(10);
        fs::remove_dir_all(directory).expect("was made above");
        limit
    }

    #[test]
    fn limits_are_read_from_the_files_of_their_version() {
        let stat = "anon 1\nsock 12288\ninactive_file 4857600\nslab_reclaimable 10570\n";
        let version_2 = [
            ("memory.max", "1073741824\n"),
            ("memory.high", "536870912\n"),
            ("memory.current", "104857600\n"),
            ("memory.stat", stat),
        ];
        let limited = group("two", &VERSION_2, &version_2).expect("has a limit");
        assert_eq!(limited.limit_bytes, 536_870_912);
        assert_eq!(limited.room_bytes(), 536_870_912 - 100_000_000);
        assert_eq!(limited.socket_data_bytes, Some(12_288));

        let version_1 =
            [("memory.limit_in_bytes", "1048576\n"), ("memory.usage_in_bytes", "2097152\n")];
        let overdrawn = group("one", &VERSION_1, &version_1).expect("has a limit");
        assert_eq!((overdrawn.limit_bytes, overdrawn.room_bytes()), (1 << 20, 0));
        assert_eq!(overdrawn.socket_data_bytes, None);

        let free = [("memory.max", "max\n"), ("memory.current", "4096\n")];
        assert_eq!(group("free", &VERSION_2, &free), None);
        let unlimited = "9223372036854771712\n";
        let huge = [("memory.limit_in_bytes", unlimited), ("memory.usage_in_bytes", "4096\n")];
        assert_eq!(group("huge", &VERSION_1, &huge), None);
    }

    #[test]
    fn a_limit_above_what_can_be_seen_binds_too() {
        let files = [
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.usage_in_bytes", "4194304\n"),
            ("memory.stat", "cache 0\nhierarchical_memory_limit 16777216\n"),
        ];
        let limited = group("above", &VERSION_1, &files).expect("has a limit");
        assert_eq!((limited.limit_bytes, limited.room_bytes()), (16 << 20, 12 << 20));
    }

    #[test]
    fn page_cache_is_room_whether_it_was_used_lately_or_not() {
        let files = [
            ("memory.limit_in_bytes", "16777216\n"),
            ("memory.usage_in_bytes", "16777216\n"),
            ("memory.stat", "total_inactive_file 1048576\ntotal_active_file 11534336\n"),
        ];
        let limited = group("cache-one", &VERSION_1, &files).expect("has a limit");
        assert_eq!(limited.room_bytes(), 12 << 20);
        let stat = "inactive_file 1048576\nactive_file 11534336\nslab_reclaimable 1059146\n";
        let files =
            [("memory.max", "16777216\n"), ("memory.current", "16777216\n"), ("memory.stat", stat)];
        let limited = group("cache-two", &VERSION_2, &files).expect("has a limit");
        assert_eq!(limited.room_bytes(), (13 << 20), "without what ten sockets pin of the slabs");
    }

    #[test]
    fn what_programs_run_from_is_no_room_and_a_mapped_database_is() {
        const MIB: u64 = 1 << 20;
        assert_eq!(reclaimable_cache_bytes(3 * MIB, MIB, 16 * MIB), 2 * MIB);
        assert_eq!(reclaimable_cache_bytes(900 * MIB, 900 * MIB, 1024 * MIB), 772 * MIB);
        assert_eq!(reclaimable_cache_bytes(MIB, 2 * MIB, 64 * MIB), 0);
    }

    proptest! {
        #[test]
        fn damaged_cgroups_break_nothing(cgroups in damaged(CGROUPS_1), mounts in damaged(MOUNTS_1)) {
            let _ = parse(&cgroups, &mounts, Outside::IsMountPoint);
            let _ = hidden_group(&cgroups, true);
        }
    }
}
