//! The table and the limit that binds, on simulated machines.

use c1000k_host::{
    check::{
        CapKind, Conntrack, FileTable, Machine, Requirements, Role, Row, RowStatus, Setting,
        Transport, fits, largest_target, render, settings, table,
    },
    limits::{DescriptorLimit, SystemDescriptorLimits},
    memory::{MemoryBound, MemoryRoom},
};

type Change = fn(&mut Machine);

/// Like the machine on which the project was developed, except for the limits that are too low there.
fn ample() -> Machine {
    Machine {
        descriptors: Some(DescriptorLimit { soft: 2_000_000, hard: 2_000_000 }),
        descriptors_inherited: 0,
        system_descriptors: SystemDescriptorLimits {
            per_process_max: Some(2_000_000),
            system_max: Some(4_000_000),
            system_open: Some(413),
        },
        locked_bytes_max: Some(8 << 20),
        exceeds_file_max: false,
        epoll_watches_max: Some(5_491_511),
        memory_total_bytes: Some(25 << 30),
        memory: Some(MemoryRoom {
            bytes: 24 << 30,
            total_bytes: 25 << 30,
            bound_by: MemoryBound::Machine,
            socket_data_bytes: None,
        }),
        hidden_cgroup: None,
        tcp_mem_pages: Some([287_901, 383_868, 575_802]),
        tcp_rmem_bytes: Some([4_096, 131_072, 33_554_432]),
        tcp_wmem_bytes: Some([4_096, 16_384, 4_194_304]),
        local_ports: Some(32_768..=60_999),
        local_ports_reserved: 0,
        local_ports_listening: 0,
        somaxconn: Some(4_096),
        tcp_max_syn_backlog: Some(2_048),
        tcp_max_orphans: Some(1_048_576),
        conntrack: None,
        rp_filter: Some(0),
    }
}

fn row(machine: &Machine, requirements: &Requirements, name: &str) -> Row {
    table(machine, requirements).into_iter().find(|row| row.name.starts_with(name)).expect(name)
}

fn million(role: Role) -> Requirements {
    Requirements::new(role, 1_000_000)
}

#[test]
fn an_ample_machine_fits_a_million_in_every_role() {
    for role in [Role::Server, Role::Client, Role::Both] {
        let rows = table(&ample(), &million(role));
        assert!(fits(&rows), "{}", render(&rows));
        assert!(rows.iter().all(|row| row.status != RowStatus::Advice), "{}", render(&rows));
    }
}

#[test]
fn reserved_ports_are_no_room_and_are_named() {
    let requirements = Requirements { ports: 100, ..million(Role::Client) };
    let machine = Machine { local_ports_reserved: 28_000, ..ample() };
    let range = row(&machine, &requirements, "net.ipv4.ip_local_port_range");
    assert_eq!(
        (range.status, range.present.as_str()),
        (RowStatus::Fail, "32768-60999, 28,000 reserved")
    );
    assert!(range.remedy.expect("it fails").contains("ip_local_reserved_ports"));
    assert_eq!(row(&machine, &requirements, "5-tuples").present, "23,200");
    let cap = largest_target(&machine, &requirements).expect("limits are known");
    assert_eq!((cap.kind, cap.connections), (CapKind::Ports, 23_200));
    assert!(cap.reason.contains("28,000 more are reserved"), "{}", cap.reason);
}

#[test]
fn a_port_that_the_server_listens_on_is_no_local_port() {
    let requirements = Requirements { ports: 50, ..Requirements::new(Role::Both, 4_000) };
    let mut machine = Machine { local_ports: Some(33_000..=33_099), ..ample() };
    let fit =
        |machine: &Machine| largest_target(machine, &requirements).expect("a cap").connections;
    assert_eq!(fit(&machine), 5_000);
    machine.count_listening_ports(32_990..=33_049);
    assert_eq!(fit(&machine), 2_500);
    machine.count_listening_ports(40_000..=40_099);
    assert_eq!(fit(&machine), 2_500, "ports elsewhere change nothing");
}

#[test]
fn unix_domain_sockets_need_no_ports_and_send_no_packets() {
    let narrow = Machine {
        local_ports: Some(50_000..=50_000),
        tcp_max_syn_backlog: Some(1),
        tcp_mem_pages: Some([1, 2, 3]),
        conntrack: Some(Conntrack { max: 1, count: 1, is_held: true }),
        ..ample()
    };
    let unix = Requirements { transport: Transport::Unix, ports: 1, ..million(Role::Both) };
    assert_eq!(largest_target(&narrow, &unix).expect("a cap").kind, CapKind::Descriptors);
    for name in ["net.ipv4", "5-tuples", "net.netfilter"] {
        let rows = table(&narrow, &unix).into_iter().filter(|row| row.name.starts_with(name));
        assert!(rows.into_iter().all(|row| row.status == RowStatus::NotNeeded), "{name}");
    }
    assert_eq!(row(&narrow, &unix, "net.core.somaxconn").status, RowStatus::Pass);
    let names = ["net.ipv4", "net.netfilter"];
    for setting in settings(&narrow, &unix) {
        let line = format!("{setting:?}");
        assert!(!names.iter().any(|name| line.contains(name)), "{line}");
    }
}

#[test]
fn each_limit_that_is_too_low_fails_alone_and_names_its_command() {
    let cases: &[(&str, Change, &str)] = &[
        (
            "RLIMIT_NOFILE hard",
            |machine| machine.descriptors = Some(DescriptorLimit { soft: 2_000_000, hard: 1 }),
            "ulimit -Hn 1000132",
        ),
        (
            "fs.nr_open",
            |machine| machine.system_descriptors.per_process_max = Some(1_000_131),
            "sysctl -w fs.nr_open=1000132",
        ),
        (
            "fs.file-max",
            |machine| machine.system_descriptors.system_max = Some(2_000_000),
            "sysctl -w fs.file-max=2000577",
        ),
        (
            "fs.epoll.max_user_watches",
            |machine| machine.epoll_watches_max = Some(2_000_163),
            "sysctl -w fs.epoll.max_user_watches=2000164",
        ),
        ("memory", |machine| machine.memory.as_mut().expect("is set").bytes = 6 << 30, "8.1 GB"),
        (
            "net.ipv4.tcp_mem",
            |machine| machine.tcp_mem_pages = Some([1, 2, 3]),
            "sysctl -w net.ipv4.tcp_mem=\"4096 8192 12288\"",
        ),
        ("5-tuples", |machine| machine.local_ports = Some(50_000..=59_998), "--source"),
        (
            "net.ipv4.ip_local_port_range",
            |machine| machine.local_ports = Some(50_000..=59_998),
            "sysctl -w net.ipv4.ip_local_port_range=\"10000 65535\"",
        ),
        (
            "net.core.somaxconn",
            |machine| machine.somaxconn = Some(10),
            "sysctl -w net.core.somaxconn=11",
        ),
        (
            "net.ipv4.tcp_max_syn_backlog",
            |machine| machine.tcp_max_syn_backlog = Some(1),
            "sysctl -w net.ipv4.tcp_max_syn_backlog=11",
        ),
        (
            "net.netfilter.nf_conntrack_max",
            |machine| {
                machine.conntrack = Some(Conntrack { max: 262_144, count: 7, is_held: false })
            },
            "sysctl -w net.netfilter.nf_conntrack_max=1000007",
        ),
    ];
    for (name, lower, command) in cases {
        let mut machine = ample();
        lower(&mut machine);
        let row = row(&machine, &million(Role::Both), name);
        assert_eq!(row.status, RowStatus::Fail, "{row:?}");
        assert!(row.remedy.as_ref().is_some_and(|remedy| remedy.contains(command)), "{row:?}");
        assert!(!fits(&[row]));
    }
}

#[test]
fn a_soft_limit_below_a_sufficient_hard_one_passes() {
    let mut machine = ample();
    machine.descriptors = Some(DescriptorLimit { soft: 1_024, hard: 2_000_000 });
    assert_eq!(row(&machine, &million(Role::Server), "RLIMIT_NOFILE soft").status, RowStatus::Pass);
    machine.descriptors = Some(DescriptorLimit { soft: 1_024, hard: 20_000 });
    assert_eq!(row(&machine, &million(Role::Server), "RLIMIT_NOFILE soft").status, RowStatus::Fail);
}

#[test]
fn inherited_descriptors_reduce_the_room_for_connections() {
    let mut machine = ample();
    machine.descriptors = Some(DescriptorLimit { soft: 256, hard: 256 });
    let requirements = Requirements { ports: 4, ..Requirements::new(Role::Server, 220) };
    assert_eq!(row(&machine, &requirements, "RLIMIT_NOFILE hard").status, RowStatus::Pass);
    machine.descriptors_inherited = 16;
    assert_eq!(
        self::row(&machine, &requirements, "RLIMIT_NOFILE hard").status,
        RowStatus::Pass,
        "a few"
    );
    machine.descriptors_inherited = 198;
    let row = row(&machine, &requirements, "RLIMIT_NOFILE hard");
    assert_eq!((row.status, row.needed.as_str()), (RowStatus::Fail, "438"));
    let cap = largest_target(&machine, &requirements).expect("limits are known");
    assert_eq!(cap.connections, 256 - (198 - 16) - 4 - 32);
    assert_eq!(cap.reason, "RLIMIT_NOFILE is 256 hard, of which 198 were open at the start");
    assert!(cap.remedy.contains("ulimit -Hn 438"), "{cap:?}");
}

#[test]
fn a_limit_of_files_that_was_lowered_below_the_hard_limit_is_the_cap() {
    let mut machine = ample();
    machine.system_descriptors.per_process_max = Some(1_000);
    let cap = largest_target(&machine, &million(Role::Server)).expect("limits are known");
    assert_eq!((cap.connections, cap.kind), (1_000 - 132, CapKind::Descriptors));
    assert!(cap.reason.starts_with("fs.nr_open is 1,000"), "{cap:?}");
    assert_eq!(cap.remedy, "sysctl -w fs.nr_open=1000132");
}

#[test]
fn the_limit_of_open_files_does_not_bind_who_may_exceed_it() {
    let mut machine = ample();
    machine.system_descriptors.system_open = Some(4_000_000);
    let before = row(&machine, &million(Role::Server), "fs.file-max");
    assert_eq!(before.status, RowStatus::Fail);
    let cap = largest_target(&machine, &million(Role::Server)).expect("limits are known");
    assert_eq!((cap.connections, cap.kind), (0, CapKind::Descriptors));

    machine.exceeds_file_max = true;
    let row = row(&machine, &million(Role::Server), "fs.file-max");
    assert_eq!(row.status, RowStatus::Pass, "{row:?}");
    let remedy = row.remedy.expect("it binds others");
    assert!(remedy.contains("CAP_SYS_ADMIN") && remedy.contains("fs.file-max=5000132"), "{remedy}");
    let cap = largest_target(&machine, &million(Role::Server)).expect("limits are known");
    assert!(cap.connections >= 1_000_000, "{cap:?}");
}

#[test]
fn a_cgroup_whose_limits_are_hidden_is_named() {
    let machine = Machine { hidden_cgroup: Some("/system.slice/x".into()), ..ample() };
    let row = row(&machine, &million(Role::Server), "memory");
    assert_eq!(row.status, RowStatus::Pass);
    assert!(row.remedy.is_some_and(|remedy| remedy.contains("/system.slice/x")));
}

#[test]
fn a_mere_disadvantage_is_advice_and_still_fits() {
    let mut machine = ample();
    machine.tcp_rmem_bytes = Some([256, 256, 512]);
    machine.tcp_max_orphans = Some(4_096);
    machine.rp_filter = Some(1);
    let requirements = Requirements { sources: Some(2), ..million(Role::Both) };
    for name in ["net.ipv4.tcp_rmem", "net.ipv4.tcp_max_orphans", "net.ipv4.conf"] {
        let row = row(&machine, &requirements, name);
        assert_eq!(row.status, RowStatus::Advice, "{row:?}");
        assert!(row.remedy.is_some(), "{row:?}");
    }
    assert!(fits(&table(&machine, &requirements)));
}

#[test]
fn a_role_does_not_need_what_only_the_other_needs() {
    let server = million(Role::Server);
    for name in ["net.ipv4.ip_local_port_range", "5-tuples", "net.ipv4.conf"] {
        assert_eq!(row(&ample(), &server, name).status, RowStatus::NotNeeded, "{name}");
    }
    let client = million(Role::Client);
    for name in ["net.core.somaxconn", "net.ipv4.tcp_max_syn_backlog", "net.ipv4.tcp_max_orphans"] {
        assert_eq!(row(&ample(), &client, name).status, RowStatus::NotNeeded, "{name}");
    }
    assert_eq!(row(&ample(), &client, "net.netfilter").status, RowStatus::NotNeeded);
}

#[test]
fn a_tracker_that_tracks_nothing_does_not_fail() {
    let mut machine = ample();
    machine.conntrack = Some(Conntrack { max: 262_144, count: 0, is_held: false });
    let row = row(&machine, &million(Role::Server), "net.netfilter");
    assert_eq!(row.status, RowStatus::NotNeeded);
    assert!(row.remedy.is_some_and(|remedy| remedy.contains("nf_conntrack_max=1000000")));
}

#[test]
fn an_unreadable_machine_is_unknown_and_never_fails() {
    for role in [Role::Server, Role::Client, Role::Both] {
        let rows = table(&Machine::default(), &million(role));
        assert!(fits(&rows));
        let is_unknown =
            |row: &Row| matches!(row.status, RowStatus::Unknown | RowStatus::NotNeeded);
        assert!(rows.iter().all(is_unknown), "{}", render(&rows));
        assert_eq!(largest_target(&Machine::default(), &million(role)), None);
    }
}

#[test]
fn the_table_stays_within_a_hundred_columns() {
    let mut machine = ample();
    machine.descriptors = Some(DescriptorLimit { soft: 1_024, hard: 20_000 });
    machine.epoll_watches_max = Some(100);
    machine.tcp_rmem_bytes = Some([256, 256, 512]);
    machine.tcp_max_orphans = Some(4_096);
    machine.rp_filter = Some(1);
    machine.conntrack = Some(Conntrack { max: 262_144, count: 0, is_held: false });
    machine.memory.as_mut().expect("is set").bytes = 1 << 30;
    let requirements =
        Requirements { sources: Some(4), ..Requirements::new(Role::Both, 4_000_000) };
    for line in render(&table(&machine, &requirements)).lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
}

#[test]
fn absurd_targets_are_reported_without_a_panic() {
    for (connections, ports, sources, in_flight) in
        [(u64::MAX, u64::MAX, u64::MAX, u64::MAX), (0, 0, 0, 0), (u64::MAX, 0, 0, 0)]
    {
        let requirements = Requirements {
            connections,
            ports,
            sources: Some(sources),
            in_flight,
            user_bytes_per_connection: u64::MAX,
            ..million(Role::Both)
        };
        assert!(!render(&table(&ample(), &requirements)).is_empty());
        assert!(largest_target(&ample(), &requirements).is_some());
    }
}

#[test]
fn the_tightest_limit_caps_and_says_why() {
    let mut machine = ample();
    machine.descriptors = Some(DescriptorLimit { soft: 1_024, hard: 20_000 });
    let cap = largest_target(&machine, &million(Role::Server)).expect("limits are known");
    assert_eq!((cap.connections, cap.kind), (19_868, CapKind::Descriptors));
    assert_eq!(cap.reason, "RLIMIT_NOFILE is 20,000 hard");
    assert!(cap.remedy.contains("ulimit -Hn 1000132"), "{cap:?}");
    let cap = largest_target(&machine, &million(Role::Client)).expect("limits are known");
    assert_eq!(cap.connections, 19_968);

    let cases: &[(Change, u64, &str)] = &[
        (|machine| machine.epoll_watches_max = Some(100_164), 50_000, "watches"),
        (|machine| machine.system_descriptors.system_max = Some(100_577), 50_000, "descriptors"),
        (|machine| machine.local_ports = Some(50_000..=50_009), 1_000, "ports"),
        (|machine| machine.memory.as_mut().expect("is set").bytes = 81_360, 10, "memory"),
        (
            |machine| machine.conntrack = Some(Conntrack { max: 70, count: 7, is_held: false }),
            63,
            "conntrack",
        ),
    ];
    for (lower, connections, name) in cases {
        let mut machine = ample();
        lower(&mut machine);
        let cap = largest_target(&machine, &million(Role::Both)).expect("limits are known");
        assert_eq!((cap.connections, cap.kind.to_string().as_str()), (*connections, *name));
    }
}

#[test]
fn the_cap_is_the_highest_target_that_passes_the_table() {
    let mut machine = ample();
    machine.descriptors = Some(DescriptorLimit { soft: 4_000_000, hard: 4_000_000 });
    machine.system_descriptors.per_process_max = Some(4_000_000);
    for lower in [
        (|machine| machine.descriptors = Some(DescriptorLimit { soft: 9_001, hard: 9_001 }))
            as Change,
        |machine| machine.system_descriptors.system_max = Some(9_001),
        |machine| machine.epoll_watches_max = Some(9_001),
        |machine| machine.local_ports = Some(50_000..=50_090),
        |machine| machine.memory.as_mut().expect("is set").bytes = 9_001_001,
        |machine| machine.conntrack = Some(Conntrack { max: 9_001, count: 7, is_held: false }),
    ] {
        for role in [Role::Server, Role::Client, Role::Both] {
            let mut machine = machine.clone();
            lower(&mut machine);
            let cap = largest_target(&machine, &million(role)).expect("limits are known");
            let at_cap = Requirements { connections: cap.connections, ..million(role) };
            let above = Requirements { connections: cap.connections + 1, ..million(role) };
            assert!(fits(&table(&machine, &at_cap)), "{cap:?}");
            assert!(!fits(&table(&machine, &above)), "{cap:?}");
        }
    }
}

/// A hard limit equal to the usual soft one: small tables, each with a ring.
#[test]
fn both_ends_of_a_user_share_its_lockable_memory_for_small_tables() {
    let machine =
        Machine { descriptors: Some(DescriptorLimit { soft: 1_024, hard: 1_024 }), ..ample() };
    let registered = |role| Requirements { file_table: FileTable::Registered, ..million(role) };

    let server = largest_target(&machine, &registered(Role::Server)).expect("a cap");
    assert_eq!(server.kind, CapKind::Descriptors);
    assert!(server.reason.contains("RLIMIT_NOFILE is 1,024 hard"), "{}", server.reason);

    // 8 MiB are 1,024 rings of two pages each, 512 for each end, of which one is made in advance.
    let both = largest_target(&machine, &registered(Role::Both)).expect("a cap");
    assert_eq!((both.kind, both.connections), (CapKind::Descriptors, 511 * 1_024));
    assert!(both.reason.contains("RLIMIT_MEMLOCK is 8.4 MB"), "{}", both.reason);
}

#[test]
fn the_name_of_a_cgroup_is_escaped() {
    let mut machine = ample();
    machine.memory = Some(MemoryRoom {
        bytes: 1 << 20,
        total_bytes: 2 << 20,
        bound_by: MemoryBound::Cgroup("/sys/fs/cgroup/\u{1b}[2J\nx".into()),
        socket_data_bytes: None,
    });
    let requirements = Requirements::new(Role::Server, 1_000_000);
    let cap = largest_target(&machine, &requirements).unwrap();
    for text in [cap.reason, render(&table(&machine, &requirements))] {
        assert!(text.contains("/sys/fs/cgroup/\\u{1b}[2J\\nx"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}

/// The printed line of this setting: `name = value`, preceded by `#` if it is high enough.
fn setting(machine: &Machine, requirements: &Requirements, name: &str) -> Option<String> {
    let lines = settings(machine, requirements).into_iter().map(|setting| setting.to_string());
    let mut lines = lines.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    lines.find(|line| line.trim_start_matches('#').starts_with(name))
}

#[test]
fn settings_have_room_for_both_ends_and_for_the_rest_of_the_machine() {
    let requirements = Requirements::new(Role::Server, 3_000_000);
    for (name, line) in [
        ("fs.nr_open", "fs.nr_open = 3000132"),
        ("fs.file-max", "fs.file-max = 6065536"),
        ("fs.epoll", "fs.epoll.max_user_watches = 6065536"),
        ("limits.d: root", "#limits.d: root hard nofile 3000132"),
        ("net.core.somaxconn", "#net.core.somaxconn = 4096"),
        ("net.ipv4.tcp_max_syn_backlog", "net.ipv4.tcp_max_syn_backlog = 4096"),
        ("net.ipv4.tcp_max_orphans", "net.ipv4.tcp_max_orphans = 3000000"),
        ("net.ipv4.tcp_mem", "net.ipv4.tcp_mem = 1092266 2184532 3276798"),
    ] {
        assert_eq!(setting(&ample(), &requirements, name).as_deref(), Some(line));
    }
    for (role, name) in [
        (Role::Server, "net.ipv4.ip_local_port_range"),
        (Role::Client, "net.core.somaxconn"),
        (Role::Client, "net.ipv4.tcp_max_orphans"),
        (Role::Both, "net.netfilter"),
        (Role::Both, "note"),
    ] {
        assert_eq!(setting(&ample(), &million(role), name), None, "{role:?}");
    }
    assert_eq!(settings(&Machine::default(), &requirements), [Setting::HardDescriptors(3_000_132)]);
}

#[test]
fn a_setting_lowers_no_present_number() {
    let machine = Machine { tcp_mem_pages: Some([900_000, 900_001, 900_002]), ..ample() };
    let line = setting(&machine, &million(Role::Server), "net.ipv4.tcp_mem");
    assert_eq!(line.as_deref(), Some("net.ipv4.tcp_mem = 900000 1000000 1500000"));
    let machine = Machine { local_ports: Some(1_024..=50_000), ..ample() };
    let line = setting(&machine, &million(Role::Client), "net.ipv4.ip_local_port_range");
    assert_eq!(line.as_deref(), Some("net.ipv4.ip_local_port_range = 1024 60999"));
}

#[test]
fn a_range_has_twice_the_ports_that_are_needed_or_all_that_there_are() {
    let line = |ports, sources| {
        let requirements = Requirements { ports, sources: Some(sources), ..million(Role::Client) };
        let note = setting(&ample(), &requirements, "note");
        (
            setting(&ample(), &requirements, "net.ipv4.ip_local_port_range").expect("it connects"),
            note,
        )
    };
    assert_eq!(line(100, 1), ("#net.ipv4.ip_local_port_range = 32768 60999".to_owned(), None));
    assert_eq!(line(50, 1), ("net.ipv4.ip_local_port_range = 25536 65535".to_owned(), None));
    assert_eq!(line(10, 2), ("net.ipv4.ip_local_port_range = 10000 65535".to_owned(), None));
    let (range, note) = line(1, 1);
    assert_eq!(range, "net.ipv4.ip_local_port_range = 10000 65535");
    assert_eq!(
        note.expect("they do not suffice"),
        "#note: the 5-tuples of 1 source x 1 destination port x 55,536 local ports are too few: use more source \
         addresses or more ports"
    );
}

#[test]
fn a_tracker_is_set_where_it_tracks_or_a_firewall_holds_it() {
    for (count, is_held, line) in [
        (0, false, None),
        (7, false, Some("net.netfilter.nf_conntrack_max = 1065536")),
        (0, true, Some("net.netfilter.nf_conntrack_max = 1065536")),
    ] {
        let conntrack = Some(Conntrack { max: 262_144, count, is_held });
        let machine = Machine { conntrack, ..ample() };
        assert_eq!(setting(&machine, &million(Role::Server), "net.netfilter").as_deref(), line);
    }
}

#[test]
fn a_strict_reverse_path_is_loosened_for_several_sources() {
    let name = "net.ipv4.conf.all.rp_filter";
    for (rp_filter, sources, line) in [
        (0, 2, None),
        (1, 1, None),
        (1, 2, Some("net.ipv4.conf.all.rp_filter = 2")),
        (2, 2, Some("#net.ipv4.conf.all.rp_filter = 2")),
    ] {
        let machine = Machine { rp_filter: Some(rp_filter), ..ample() };
        let requirements = Requirements { sources: Some(sources), ..million(Role::Client) };
        assert_eq!(
            setting(&machine, &requirements, name).as_deref(),
            line,
            "{rp_filter} {sources}"
        );
    }
}
