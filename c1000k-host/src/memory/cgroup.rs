//! Memory limits of the cgroups around this process, versions 1 and 2.
//!
//! A limit anywhere on the way up to the root of the hierarchy binds all that is below it. Which
//! files are read is settled once; a process that is moved to another group keeps being measured
//! by the first.

use {
    crate::text,
    procfs::{
        FromRead, ProcessCGroups,
        process::{MountInfo, MountInfos},
    },
    std::path::{Path, PathBuf},
};

/// A limit of 2^62 or more is the kernel's way to say that there is none.
const UNLIMITED_BYTES: u64 = 1 << 62;

/// One cgroup that has a memory limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupLimit {
    /// The group's directory.
    pub directory: PathBuf,
    /// Past this the group's processes are throttled or killed.
    pub limit_bytes: u64,
    /// What the group and all groups below it use.
    pub used_bytes: u64,
    /// The part of it that is page cache out of use, which the kernel takes back first.
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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups(Vec<Group>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    directory: PathBuf,
    files: &'static Files,
}

/// The names that a version of the interface uses.
#[derive(Debug, PartialEq, Eq)]
struct Files {
    /// Each of these limits.
    limits: &'static [&'static str],
    used: &'static str,
    /// The key in `memory.stat`, groups below included.
    reclaimable: &'static str,
    /// The same for data in sockets. Version 1 counts that elsewhere, and by default not at all.
    socket_data: Option<&'static str>,
}

const VERSION_1: Files = Files {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
    socket_data: None,
};

const VERSION_2: Files = Files {
    // Above `high` the group is throttled until it is of no use: that binds as `max` does.
    limits: &["memory.max", "memory.high"],
    used: "memory.current",
    reclaimable: "inactive_file",
    socket_data: Some("sock"),
};

impl Cgroups {
    /// The groups of this process; none where they can't be told.
    pub fn of_self() -> Self {
        let cgroups = text::read("/proc/self/cgroup").unwrap_or_default();
        let mounts = text::read("/proc/self/mountinfo").unwrap_or_default();
        Self::parse(&cgroups, &mounts).unwrap_or_default()
    }

    /// The limits that are set, with what is used of them now.
    pub fn limits(&self) -> impl Iterator<Item = CgroupLimit> {
        self.0.iter().filter_map(Group::limit)
    }

    fn parse(cgroups: &str, mounts: &str) -> Option<Self> {
        let cgroups = ProcessCGroups::from_read(cgroups.as_bytes()).ok()?;
        let mounts = MountInfos::from_read(mounts.as_bytes()).ok()?;
        let mut groups = Vec::new();
        for mount in mounts.iter() {
            let Some(files) = files_of(mount) else { continue };
            let member = |controllers: &[String]| match mount.fs_type.as_str() {
                "cgroup2" => controllers.is_empty(),
                _ => controllers.iter().any(|name| name == "memory"),
            };
            let Some(own) = cgroups.0.iter().find(|group| member(&group.controllers)) else {
                continue;
            };
            let directories = directories(mount, &own.pathname);
            groups.extend(directories.map(|directory| Group { directory, files }));
        }
        Some(Self(groups))
    }
}

impl Group {
    fn limit(&self) -> Option<CgroupLimit> {
        let number = |name: &&str| text::read_number(self.directory.join(name));
        let limit_bytes = self.files.limits.iter().filter_map(number).min()?;
        if limit_bytes >= UNLIMITED_BYTES {
            return None;
        }
        let stat = text::read(self.directory.join("memory.stat")).unwrap_or_default();
        Some(CgroupLimit {
            directory: self.directory.clone(),
            limit_bytes,
            used_bytes: number(&self.files.used)?,
            reclaimable_bytes: stat_value(&stat, self.files.reclaimable).unwrap_or(0),
            socket_data_bytes: self
                .files
                .socket_data
                .map(|key| stat_value(&stat, key).unwrap_or(0)),
        })
    }
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
///
/// In a container the path may lead outside of what is mounted; then the mount point is all that
/// can be seen, and it is the container's own group.
fn directories(mount: &MountInfo, path: &str) -> impl Iterator<Item = PathBuf> {
    let top = mount.mount_point.clone();
    let below = Path::new(path)
        .strip_prefix(&mount.root)
        .ok()
        .filter(|below| !below.components().any(|part| part.as_os_str() == ".."))
        // Collecting drops the slash that joining an empty path leaves at the end.
        .map(|below| top.join(below).components().collect::<PathBuf>());
    let start = below.unwrap_or_else(|| top.clone());
    let directories: Vec<PathBuf> =
        start.ancestors().take_while(|above| above.starts_with(&top)).map(PathBuf::from).collect();
    directories.into_iter()
}

fn stat_value(stat: &str, key: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use {super::*, crate::text::tests::damaged, proptest::prelude::*, std::fs};

    const MOUNTS_1: &str = "\
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const CGROUPS_1: &str = "9:name=systemd:/\n4:memory:/outer/inner\n3:cpuset:/\n0::/\n";

    fn directories_of(cgroups: &str, mounts: &str) -> Vec<String> {
        let groups = Cgroups::parse(cgroups, mounts).unwrap_or_default();
        groups.0.iter().map(|group| group.directory.display().to_string()).collect()
    }

    #[test]
    fn the_own_group_and_all_above_it_are_found() {
        let expected = [
            "/sys/fs/cgroup/memory/outer/inner",
            "/sys/fs/cgroup/memory/outer",
            "/sys/fs/cgroup/memory",
            "/sys/fs/cgroup/unified",
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
    fn limits_are_read_from_the_files_of_their_version() {
        let root = std::env::temp_dir().join(format!("c1000k-host-cgroup-{}", std::process::id()));
        let version_2 = Group { directory: root.join("two"), files: &VERSION_2 };
        let version_1 = Group { directory: root.join("one"), files: &VERSION_1 };
        let unlimited = Group { directory: root.join("free"), files: &VERSION_2 };
        let huge = Group { directory: root.join("huge"), files: &VERSION_1 };
        for (file, text) in [
            ("two/memory.max", "1073741824\n"),
            ("two/memory.high", "536870912\n"),
            ("two/memory.current", "104857600\n"),
            ("two/memory.stat", "anon 1\nsock 12288\ninactive_file 4857600\nactive_file 9\n"),
            ("one/memory.limit_in_bytes", "1048576\n"),
            ("one/memory.usage_in_bytes", "2097152\n"),
            ("free/memory.max", "max\n"),
            ("free/memory.current", "4096\n"),
            ("huge/memory.limit_in_bytes", "9223372036854771712\n"),
            ("huge/memory.usage_in_bytes", "4096\n"),
        ] {
            let path = root.join(file);
            fs::create_dir_all(path.parent().expect("has a parent")).expect("a new directory");
            fs::write(path, text).expect("a new file");
        }

        let limited = version_2.limit().expect("has a limit");
        assert_eq!(limited.limit_bytes, 536_870_912);
        assert_eq!(limited.room_bytes(), 536_870_912 - 100_000_000);
        assert_eq!(limited.socket_data_bytes, Some(12_288));
        let overdrawn = version_1.limit().expect("has a limit");
        assert_eq!((overdrawn.limit_bytes, overdrawn.room_bytes()), (1 << 20, 0));
        assert_eq!(overdrawn.socket_data_bytes, None);
        assert_eq!(unlimited.limit(), None);
        assert_eq!(huge.limit(), None);
        fs::remove_dir_all(root).expect("was made above");
    }

    proptest! {
        #[test]
        fn damaged_cgroups_break_nothing(cgroups in damaged(CGROUPS_1), mounts in damaged(MOUNTS_1)) {
            let _ = Cgroups::parse(&cgroups, &mounts);
        }
    }
}
