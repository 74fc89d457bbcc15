//! The program on directories of runs: its output if all records agree, if one is wrong or missing, and if there is no
//! run.

#![expect(clippy::unwrap_used, reason = "the panic of a test is its report")]

mod fixture;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Output};

use fixture::{Fixture, report};
use serde_json::{Value, json};

/// The latencies of a storm.
const HISTOGRAM: &str = "HISTFAAABgl4nF1WPa4cRRCeV1Ovt12vabeboTWMx+unlbEQEj9CBJaxZBICEhICUhJOwAFISAiIfAJCAkICzoAIESEHIOEIfF/17OyD3Z2Znu6urqqvvqra9btXrw9D+mHon3F7XuGaHv351fDynz7x9zsyyuDXPRW5lvvb2yij9gfu134dfPFmm+vXec+Nv6sOGgTDA19EB/Gvqnwtv42C8eWnFOTB4pvON9fq06NPjdt2+Z/4KPuSS3aZQQ6hv1/fOVXOJ4znCahwbx/u7o2bvmsf3duuPh52ly+zl7nrOzMHfM+7hs3+/iV8D7sJd3TQjg5tx+Isf5E77PLdznu7TZTCjI6b1VtI9CJ38UJ2X/rztY7D5ejRD4N6Hfet7/paN0tHPSjxVA95RKRjiDEOmLQ6mUcUkxYkYiUAXY3YbgEbo4km06B401KwGDQHTJhErgcsBQhh1STwKZahB2PQKUQLSaMpdkUdgmBv1N3uHlksDp1wsAJblNbQCBVoF4muBLORDnCNr7xwOLyxyCNwPPdIGCRYcAkIgNEc6KAbFTkgClTndgdaGjXSNgpYcucywIhRUmnFQiwp4RyCAQG6FCwmiEPMAoCCEHbDN6AUYVNMBIVfG3Dm4GCY9hC4Y3TQP+45FzoG7iKHmICSblNKsZhRl5pp1hTgLu3GMMMSswyMkyKWPGw7EzgHf0bCQsVeAh7KRlPnlnPpZhv6w6cOG2WHLU1u5E35OMi38pYsoo/k8Ra/HkfewiY5/Lf0DHdyeZQtDFy6UyPGPYP3qa0K7AklHRQPkjiR3CPEPXSHx86ZHuzd8EttGO/YpC5BouAlbGAN0c/zH/U642hCdM5ttQif15kQJuAYQw4GRBITv7/82E583l1NH3LZk+xGZGM4dgXSneuugnmpepD3CWEPh8PltVnOtfNcEOnJH1ceW2eN3Nd9B/381LkOL0ltsig4Xq7+ggc4DuIinUH/SGYjtWkm6Uu4Q4fYmMokrmnBXkvRsuWQ1fOeZp/ZPOy3S1eg+QQl0NHQcaVtnnYMKGtGRNrQSiRZRF7jnRnMxAta8zzliiEUp5KmKdWaW0k5G5ZzyTHTTeRpnNyjwGPDlmeYRZJU5jXspgr3C3u46vXOTYhMwdDDJNExd6+ixI4DDRoo7SvdDVKRrkWnH/ffd+Cv5QunkTKVXu7kOXcwsnsP17Cj1iO5byIJpSMMziUk+VbZnEMOnZcZZ46xAHDWoabVLLaC4hA8eTrungRB76mVjMIJRyMOBmSWp4rg5zhXDXk1xhgLjhVdbEcfobKhBoqljHihLFUEpMRmpdR6QkVMaa7HUyszTptKfXJaW2ZRzaxdPSAxs+8YJHNizEXyi6cok7EWa8eUGNeMvTUep2WFWVMFO0tJjG/FybmsuDBqMDEvrUQzqE/YOLVW81KXKbeM9zTVta3L2iasgkG5Tpk0rBlaAvQbzky5QRgHFMyWNs/LvNY5NR41Lben+XY9Pp3nY5tbO86t3Fb6NC/Li2cf3B5bW+rcrLYClQYLYExbytPTelyXOSssRg9pCwHLwIBgh7y8+ChiOAUvuIc9ZSTUMy8SPvGWbYVGIlY5Txis8cnzSiJ776ILbnWZkBxGnp8ATZrQMIoRx3Bm1DW6CLyEc2mdapngdKk5t+X0bDWHosTeNrH5QWTa0FJ2HPYYqG41Qc8J/tc2r1MpC3RPcBkaEeuS5oQuhcpgSWcwKeFEiPFwVAu8EQJdzSvW8glLDqj0RgI1WIfljcAIG5obOjr0wi+gBoJ6hmqC3CEZGDy/N8hjRcsL+M9j2guxhULCBmPTjOzH6sf5JHiKdw95hh3gEHmmtS5AYZ6j62RlgOtACgUn4U+U+pSe20Iv771/w1yqYWWzsK+T4m5sb07+HTeZ3q0+ky9RTuT7q8mNDlYMHSmW6ZcruR/S0uyb5+uHD+Snq7KUqdbp8/R4/z969zvusw/8f07wv2GsqHgCk5LIG8+aXvBUfxxRK+kpEiAZKqj8Lluv2VridqvFC1GeNJf4s2gDXZCAJRykVtC7FPn1invLK4lvr09OxwfyL26YZNo=";

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Exactly this check finds the difference, all others agree, and the exit code is 1.
fn assert_disagrees(fixture: &Fixture, check: &str) {
    let output = fixture.summarize(&[]);
    let text = stdout(&output);
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("Disagrees:")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert!(lines[0].contains(check), "{text}");
    assert_eq!(output.status.code(), Some(1), "{text}");
}

/// A record or a snapshot is missing: the check is unknown, and only `--check` fails.
fn assert_unknown(fixture: &Fixture, check: &str) {
    let output = fixture.summarize(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    assert_row_unknown(fixture, check);
    assert_eq!(fixture.summarize(&["--check"]).status.code(), Some(1));
}

fn assert_row_unknown(fixture: &Fixture, check: &str) {
    let page = fixture.read("summary.md");
    let row = page.lines().find(|line| line.starts_with(&format!("| {check}")));
    assert!(row.is_some_and(|row| row.contains("| unknown ")), "{check}: {page}");
}

/// The record is missing: this is reported, the run fails, and no figure is derived.
fn assert_record_missing(fixture: &Fixture, name: &str) {
    let output = fixture.summarize(&[]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("\nMissing: {name}\n")), "{text}");
    assert!(text.contains(" 0 disagree"), "{text}");
    assert_row_unknown(fixture, "Connections held at once");
}

/// The difference is shown with its reason, and nothing fails.
fn assert_not_judged(fixture: &Fixture, check: &str, reason: &str) {
    let output = fixture.summarize(&["--check"]);
    let text = stdout(&output);
    let line = text.lines().find(|line| line.starts_with(&format!("Not judged: {check}")));
    assert!(line.is_some_and(|line| line.contains(reason)), "{text}");
    assert!(text.contains(" 0 disagree"), "{text}");
    assert_eq!(output.status.code(), Some(0), "{text}");
}

/// Two clients of 50,000 connections: only their records and the server's.
fn two_clients() -> Fixture {
    let fixture = Fixture::three_hosts();
    fixture.remove("snapshots");
    fixture.remove("machine.txt");
    fixture
}

#[test]
fn a_run_on_which_all_agree_passes_and_gets_a_page_and_charts() {
    let fixture = Fixture::one_host();
    let output = fixture.summarize(&["--check"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}{}", fixture.read("summary.md"));
    assert!(text.starts_with("Reached: 100,000 of 100,000 connections held at once"), "{text}");
    assert!(text.contains(" 0 disagree, 0 unknown"), "{text}");

    let page = fixture.read("summary.md");
    assert!(page.contains("| verified by echo, pass 2"), "{page}");
    assert!(page.contains("both ends of each connection"), "{page}");
    assert!(page.contains("| sock_inode_cache |"), "{page}");
    assert!(page.contains("scripts/million 100k"), "{page}");
    for chart in ["connections.svg", "rate.svg", "cost.svg", "memory.svg"] {
        assert!(fixture.read(chart).starts_with("<svg"), "{chart}");
        assert!(page.contains(&format!("]({chart})")), "{page}");
    }
}

#[test]
fn three_hosts_are_distinguished_and_compared_with_the_original_test() {
    let fixture = Fixture::three_hosts();
    let output = fixture.summarize(&["--check"]);
    let page = fixture.read("summary.md");
    assert_eq!(output.status.code(), Some(0), "{}{page}", stdout(&output));
    assert!(stdout(&output).contains("100,000 of 100,000"), "{}", stdout(&output));
    for text in ["1,150,000", "2.6 GB", "1.2 GB", "1.5 GB", "700.0 MB", "one end of each"] {
        assert!(page.contains(text), "{text}: {page}");
    }
}

#[test]
fn a_server_that_held_fewer_disagrees() {
    let fixture = Fixture::one_host();
    fixture.set("server.json", "peak", json!(99_999));
    assert_disagrees(&fixture, "Connections held at once");
}

#[test]
fn a_server_that_accepted_fewer_disagrees() {
    let fixture = Fixture::one_host();
    fixture.set("server.json", "accepted", json!(99_999));
    fixture.set("server.json", "closed", json!(99_999));
    assert_disagrees(&fixture, "Connections accepted");
}

#[test]
fn a_connection_that_was_never_closed_disagrees() {
    let fixture = Fixture::one_host();
    fixture.set("server.json", "closed", json!(99_998));
    assert_disagrees(&fixture, "Connections accounted for");
}

#[test]
fn a_refusal_that_no_client_saw_disagrees() {
    let fixture = Fixture::one_host();
    fixture.set("server.json", "refused", json!(2));
    assert_disagrees(&fixture, "Connections refused");
}

#[test]
fn a_verdict_that_does_not_follow_from_its_figures_disagrees() {
    let fixture = Fixture::one_host();
    fixture.set("client.json", "target", json!(100_001));
    assert_disagrees(&fixture, "Verdict of client");
}

#[test]
fn an_echo_that_did_not_come_back_disagrees() {
    let fixture = Fixture::one_host();
    fixture.set("client.json", "verified_passes", json!([99_999, 100_000]));
    assert_disagrees(&fixture, "Echoes of client, pass 1");
}

#[test]
fn fewer_sockets_in_sockstat_than_connections_disagree() {
    let fixture = Fixture::one_host();
    fixture.replace("snapshots/one/peak/sockstat", "inuse 200101", "inuse 199000");
    assert_disagrees(&fixture, "Sockets of host one");
}

#[test]
fn slabs_that_hold_too_few_sockets_disagree() {
    let fixture = Fixture::one_host();
    fixture.replace("snapshots/one/peak/slabinfo", "TCP 200090", "TCP 190000");
    assert_disagrees(&fixture, "Slab objects of host one");
}

#[test]
fn a_cost_that_the_slabs_do_not_show_disagrees() {
    let fixture = Fixture::one_host();
    fixture.set("server.json", "kernel_bytes_per_connection", json!(7_700));
    assert_disagrees(&fixture, "Kernel bytes for one end");
}

#[test]
fn slabs_of_other_processes_are_not_a_disagreement() {
    let fixture = Fixture::one_host();
    let inodes = |objects| {
        format!("inodes {objects} {objects} 1024 4 1 : tunables 0 0 0 : slabdata 1 {objects} 0\n")
    };
    for (moment, objects) in [("before", 10), ("peak", 60_000), ("after", 90_000)] {
        let name = format!("snapshots/one/{moment}/slabinfo");
        fixture.put(&name, &(fixture.read(&name) + &inodes(objects)));
    }
    // A walk through a directory tree leaves a dentry for each file.
    for moment in ["peak", "after"] {
        let name = format!("snapshots/one/{moment}/slabinfo");
        let dentries = fixture.read(&name).replace("192 21 1 ", "192 21 7 ");
        fixture.put(&name, &dentries);
    }
    let output = fixture.summarize(&["--check"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
}

#[test]
fn a_merged_slab_cache_is_counted_under_its_own_name() {
    let fixture = Fixture::one_host();
    for moment in ["before", "peak", "after"] {
        let name = format!("snapshots/one/{moment}/slabinfo");
        fixture.replace(&name, "sock_inode_cache", "merged");
    }
    assert_disagrees(&fixture, "Kernel bytes for one end");
    fixture.set("server.json", "slabs_shown_as", json!({"sock_inode_cache": "merged"}));
    assert_eq!(fixture.summarize(&["--check"]).status.code(), Some(0));
    assert!(fixture.read("summary.md").contains("| sock_inode_cache |"));
}

#[test]
fn a_process_that_grew_too_large_disagrees() {
    let fixture = Fixture::one_host();
    fixture.replace("snapshots/one/peak/server-smaps_rollup", "3400 kB", "34000 kB");
    fixture.set("server.json", "rss_at_peak_bytes", json!(34_000 * 1_024));
    assert_disagrees(&fixture, "Memory that the server's process may take");
}

#[test]
fn a_server_that_reports_less_memory_than_the_kernel_disagrees() {
    let fixture = Fixture::one_host();
    fixture.set("server.json", "rss_at_peak_bytes", json!(3_000_000));
    assert_disagrees(&fixture, "Memory of the server's process at the peak");
}

#[test]
fn the_bytes_of_a_connection_are_those_of_the_record() {
    let fixture = Fixture::one_host();
    fixture.replace("snapshots/one/peak/server-smaps_rollup", "3400 kB", "3300 kB");
    fixture.set("server.json", "user_bytes_per_connection", json!(27.03));
    assert_eq!(fixture.summarize(&[]).status.code(), Some(0));
    let page = fixture.read("summary.md");
    assert!(page.contains("The server's process: 27.0 B a connection"), "{page}");
    assert!(page.contains("resident 1.0 MB before, 3.5 MB at the peak"), "{page}");
    let compared = fixture.compare_with_itself();
    let row = compared.lines().find(|line| line.contains("process, a connection")).unwrap();
    assert_eq!(row.matches("27.0 B").count(), 2, "{row}");
}

#[test]
fn slabs_that_are_not_returned_disagree() {
    let fixture = Fixture::one_host();
    fixture.put("snapshots/one/after/slabinfo", &fixture.read("snapshots/one/peak/slabinfo"));
    assert_disagrees(&fixture, "Slab memory given back");
}

#[test]
fn an_accept_queue_that_overflowed_disagrees() {
    let fixture = Fixture::one_host();
    fixture.replace("snapshots/one/after/netstat", "0 7 9", "0 8 9");
    assert_disagrees(&fixture, "ListenOverflows");

    let fixture = Fixture::one_host();
    fixture.set("server.json", "counters", json!({"ListenOverflows": 0, "ListenDrops": 1}));
    assert_disagrees(&fixture, "ListenDrops");
}

#[test]
fn a_ramp_that_slows_down_is_reported_and_fails_nothing() {
    let fixture = Fixture::one_host();
    let slowing: Vec<_> =
        (1..=40_u64).map(|at| json!({"seconds": at * at, "established": at * 2_500})).collect();
    fixture.set("client.json", "ramp_series", json!(slowing));
    assert_not_judged(&fixture, "Rate of client", "speed depends on the machine's other load");
}

#[test]
fn figures_that_other_processes_can_change_are_judged_only_in_a_guest() {
    type Change = fn(&Fixture);
    let changes: [(&str, Change); 5] = [
        ("Sockets of host one", |fixture| {
            fixture.replace("snapshots/one/peak/sockstat", "inuse 200101", "inuse 205000");
        }),
        ("Slab objects of host one", |fixture| {
            fixture.replace("snapshots/one/peak/slabinfo", "TCP 200090", "TCP 210000");
        }),
        ("Slab memory given back", |fixture| {
            fixture
                .put("snapshots/one/after/slabinfo", &fixture.read("snapshots/one/peak/slabinfo"));
        }),
        ("ListenDrops", |fixture| {
            fixture.replace("snapshots/one/after/netstat", "0 7 9", "0 7 10");
        }),
        ("Kernel bytes for one end", |fixture| {
            fixture.set("server.json", "kernel_bytes_per_connection", json!(4_500));
        }),
    ];
    for (check, change) in changes {
        let fixture = Fixture::one_host();
        change(&fixture);
        assert_disagrees(&fixture, check);
        fixture.replace("machine.txt", "where: vm", "where: native");
        assert_not_judged(&fixture, check, "includes other processes");
    }
}

#[test]
fn figures_that_no_other_process_can_change_disagree_on_any_machine() {
    for (file, right, wrong, check) in [
        ("sockstat", "inuse 200101", "inuse 199000", "Sockets of host one"),
        ("slabinfo", "TCP 200090", "TCP 190000", "Slab objects of host one"),
    ] {
        let fixture = Fixture::one_host();
        fixture.replace("machine.txt", "where: vm", "where: native");
        fixture.replace(&format!("snapshots/one/peak/{file}"), right, wrong);
        assert_disagrees(&fixture, check);
    }
}

#[test]
fn too_few_connections_are_measured_but_not_judged() {
    let fixture = Fixture::one_host();
    fixture.remove("snapshots");
    for field in ["target", "attempted", "established", "verified"] {
        fixture.set("client.json", field, json!(100));
    }
    fixture.set("client.json", "verified_passes", json!([100, 100]));
    for field in ["accepted", "closed", "peak"] {
        fixture.set("server.json", field, json!(100));
    }
    fixture.set("server.json", "user_bytes_per_connection", json!(1_064.0));
    fixture.set(
        "server.json",
        "prediction",
        json!({"connections": 100, "process_bytes": 2_400, "kernel_bytes": 385_000}),
    );
    let output = fixture.summarize(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    assert!(stdout(&output).contains("too few connections to measure"), "{}", stdout(&output));
}

#[test]
fn a_prediction_that_is_far_off_disagrees_and_a_near_one_does_not() {
    let fixture = Fixture::one_host();
    // Predicted for twice as many connections as were held; the check compares bytes per connection.
    let predicted = |kernel_bytes: u64| json!({"connections": 200_000, "process_bytes": 9_600_000, "kernel_bytes": kernel_bytes});
    fixture.set("server.json", "prediction", predicted(800_000_000));
    assert_eq!(fixture.summarize(&["--check"]).status.code(), Some(0));
    assert!(fixture.read("summary.md").contains("process 48.0 B predicted, 24.6 B found"));

    fixture.set("server.json", "prediction", predicted(900_000_000));
    assert_disagrees(&fixture, "Prediction of the server's memory");
}

#[test]
fn a_missing_server_record_leaves_checks_unknown() {
    let fixture = Fixture::one_host();
    fixture.remove("server.json");
    assert_record_missing(&fixture, "server.json");
    let process = |page: &str| {
        let line = page.lines().find(|line| line.starts_with("The server's process: "));
        line.unwrap().to_owned()
    };
    let page = fixture.read("summary.md");
    assert!(process(&page).contains(" B a connection; resident 1.0 MB before, "), "{page}");
    fixture.remove("snapshots");
    let page = stdout(&fixture.summarize(&["--format", "markdown"]));
    assert_eq!(process(&page), "The server's process: unknown.");
}

#[test]
fn a_missing_record_of_one_client_of_two_leaves_the_verdict_unknown() {
    let fixture = Fixture::three_hosts();
    fixture.remove("client-2.json");
    assert_record_missing(&fixture, "client-2.json");
    assert!(stdout(&fixture.summarize(&[])).starts_with("Unknown, a record is missing"));
}

#[test]
fn without_slabinfo_its_checks_are_unknown() {
    let fixture = Fixture::one_host();
    fixture.remove("snapshots/one/peak/slabinfo");
    assert_unknown(&fixture, "Slab objects of host one");
    assert!(!fixture.exists("cost.svg"));
    assert!(fixture.read("summary.md").contains("The kernel: 3,850 B for one end"));
}

#[test]
fn a_run_without_snapshots_is_judged_by_its_records() {
    let fixture = Fixture::one_host();
    fixture.remove("snapshots");
    fixture.remove("machine.txt");
    assert_unknown(&fixture, "Sockets of host one");
}

#[test]
fn missing_snapshots_are_named_with_the_checks_that_were_not_made_for_them() {
    let fixture = Fixture::one_host();
    assert_eq!(stderr(&fixture.summarize(&[])), "");
    fixture.remove("snapshots/one/after");
    let named = "snapshots/one/after, so these checks were not made: Slab memory given back";
    let output = fixture.summarize(&[]);
    assert!(stdout(&output).contains(&format!("\nMissing: {named}")), "{}", stdout(&output));
    assert!(stderr(&output).contains(named), "{}", stderr(&output));

    fixture.remove("snapshots");
    for format in [&[][..], &["--format", "markdown"], &["--format", "json"]] {
        let output = fixture.summarize(format);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let line = stderr(&output);
        assert_eq!(line.lines().count(), 1, "{line}");
        for part in [": snapshots, so", "Sockets of host one", "Slab objects of host one"] {
            assert!(line.contains(part), "{line}");
        }
        assert!(!line.contains("Connections accepted"), "the records have it: {line}");
    }
    let summary: Value =
        serde_json::from_str(&stdout(&fixture.summarize(&["--format", "json"]))).unwrap();
    assert_eq!(summary["missing_snapshots"], json!(["snapshots"]));

    let fixture = Fixture::three_hosts();
    fixture.remove("snapshots/client-1");
    let missing = "\nMissing: snapshots/client-1, so";
    assert!(stdout(&fixture.summarize(&[])).contains(missing));
}

#[test]
fn a_summary_with_more_checks_is_kept_when_the_snapshots_are_gone() {
    let fixture = Fixture::one_host();
    fixture.summarize(&[]);
    let page = fixture.read("summary.md");
    fixture.remove("snapshots");
    let output = fixture.summarize(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("summary.md is kept"), "{}", stderr(&output));
    assert_eq!((stderr(&output).lines().count(), fixture.read("summary.md")), (1, page));
    assert!(!stdout(&output).contains("summary.md"), "it was not written: {}", stdout(&output));

    fixture.remove("summary.md");
    let output = fixture.summarize(&[]);
    assert!(stdout(&output).contains("/summary.md\n"), "{}", stdout(&output));
    let poorer = fixture.read("summary.md");
    assert!(poorer.contains("Missing: snapshots, so these checks were not made"), "{poorer}");
    fixture.remove("server.json");
    fixture.summarize(&[]);
    assert_ne!(fixture.read("summary.md"), poorer, "it was made without snapshots, too");
}

#[test]
fn a_record_is_read_whatever_bytes_its_name_has() {
    let fixture = Fixture::three_hosts();
    let renamed = fixture.path().join(OsStr::from_bytes(b"client-\xff.json"));
    fs::rename(fixture.path().join("client-2.json"), renamed).unwrap();
    let output = fixture.summarize(&[]);
    assert!(stdout(&output).starts_with("Reached: 100,000 of 100,000"), "{}", stdout(&output));
    assert!(fixture.read("summary.md").contains("| client-\u{fffd} "));
    let row = fixture.compare_with_itself();
    assert!(row.contains("| held at once ") && row.contains("100,000"), "{row}");
}

#[test]
fn a_run_between_two_machines_passes_by_its_records_alone() {
    let fixture = Fixture::one_host();
    fixture.remove("snapshots");
    fixture.remove("machine.txt");
    fixture.set("client.json", "destination", json!("192.0.2.1:9900"));
    let output = fixture.summarize(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    assert!(stdout(&output).starts_with("Reached: 100,000 of 100,000"), "{}", stdout(&output));
    let page = fixture.read("summary.md");
    assert_eq!(page.lines().next(), Some("# 100,000 connections"), "the hosts are not known");
}

#[test]
fn the_file_table_and_warmed_memory_are_reported() {
    let fixture = Fixture::one_host();
    let summary = || -> Value {
        serde_json::from_str(&stdout(&fixture.summarize(&["--format", "json"]))).unwrap()
    };
    assert_eq!(summary()["memory_warmed"], json!(null));
    assert_eq!(summary()["server"]["file_table"], json!(null));
    for (line, warmed) in [("yes", json!(true)), ("no", json!(false)), ("maybe", json!(null))] {
        fixture.put("machine.txt", &format!("where: vm\nmemory touched before the run: {line}\n"));
        assert_eq!(summary()["memory_warmed"], warmed);
    }
    fixture.set("server.json", "file_table", json!("registered"));
    fixture.set("client.json", "file_table", json!("process"));
    assert_eq!(summary()["server"]["file_table"], "registered");
    assert_eq!(summary()["clients"][0]["file_table"], "process");
    let page = stdout(&fixture.summarize(&["--format", "markdown"]));
    for row in ["file table of server", "file table of client", "memory touched before the run"] {
        assert!(page.contains(&format!("| {row} ")), "{row}: {page}");
    }
}

#[test]
fn connections_held_at_different_times_are_not_added_up() {
    let fixture = two_clients();
    fixture.set("client-2.json", "started_at", json!("2001-01-01T00:01:00Z"));
    fixture.set("server.json", "peak", json!(50_000));
    let output = fixture.summarize(&[]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("Not held at once: the times"), "{text}");
    assert!(text.contains("client-1 held 50,000 of 50,000, client-2 held 50,000"), "{text}");
    let page = fixture.read("summary.md");
    assert!(page.starts_with("# 50,000 connections") && !page.contains("100,000 of"), "{page}");
    assert!(!fixture.compare_with_itself().contains("| held at once                 | 100,000"));
    assert_row_unknown(&fixture, "Connections held at once");
}

#[test]
fn connections_to_different_servers_are_not_added_up() {
    let fixture = two_clients();
    fixture.set("client-2.json", "destination", json!("192.0.2.2:9900"));
    // A server with that peak, which also had other connections, does not prove theirs.
    fixture.set("server.json", "accepted", json!(100_001));
    fixture.set("server.json", "closed", json!(100_001));
    for is_recorded in [true, false] {
        let output = fixture.summarize(&[]);
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(1), "{is_recorded}: {text}");
        assert!(
            text.starts_with("Not known to be held at once: the clients name different servers"),
            "{text}"
        );
        if is_recorded {
            fixture.remove("server.json");
        }
    }
    assert!(fixture.read("summary.md").starts_with("# 50,000 connections"));
}

#[test]
fn a_client_that_held_nothing_does_not_keep_the_others_from_being_added_up() {
    let fixture = two_clients();
    for (field, value) in [("established", 0), ("verified", 0), ("attempted", 100_000)] {
        fixture.set("client-2.json", field, json!(value));
    }
    fixture.set("client-2.json", "verdict", json!("short"));
    fixture.set("client-2.json", "destination", json!("192.0.2.2:9900"));
    fixture.set("client-2.json", "verified_passes", json!([0]));
    fixture.set("server.json", "peak", json!(50_000));
    let text = stdout(&fixture.summarize(&[]));
    assert!(text.starts_with("Short: 50,000 of 100,000 connections held at once"), "{text}");
}

#[test]
fn clients_of_one_server_whose_holds_overlap_are_added_up() {
    let apart_by = |seconds: u64, with_times: bool| {
        let fixture = two_clients();
        fixture.remove("server.json");
        let at = |second: f64| format!("2001-01-01T00:00:{second:06.3}Z");
        fixture.set("client-2.json", "started_at", json!(at(seconds as f64)));
        for (name, begin) in [("client-1.json", 0.0), ("client-2.json", seconds as f64)] {
            if with_times {
                fixture.set(name, "held_from", json!(at(begin + 10.0)));
                fixture.set(name, "held_until", json!(at(begin + 15.0)));
            }
        }
        stdout(&fixture.summarize(&[])).lines().next().unwrap().to_owned()
    };
    for with_times in [true, false] {
        let line = apart_by(3, with_times);
        assert!(line.starts_with("Reached: 100,000 of 100,000 connections held at once"), "{line}");
        let line = apart_by(5, with_times);
        assert!(line.starts_with("Not held at once"), "{line}");
    }
}

#[test]
fn the_peak_of_the_server_takes_precedence_over_clocks_and_addresses_of_clients() {
    let fixture = Fixture::three_hosts();
    fixture.set("client-1.json", "destination", json!("10.199.1.1:9900"));
    fixture.set("client-2.json", "destination", json!("10.199.2.1:9900"));
    fixture.set("client-2.json", "started_at", json!("1999-12-31T23:59:59Z"));
    let output = fixture.summarize(&["--check"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    assert!(stdout(&output).starts_with("Reached: 100,000 of 100,000"), "{}", stdout(&output));
}

#[test]
fn clients_with_and_without_verification_are_reported_separately() {
    let fixture = two_clients();
    fixture.set("client-2.json", "verified", json!(null));
    fixture.set("client-2.json", "verified_passes", json!([]));
    let text = stdout(&fixture.summarize(&[]));
    assert!(text.contains("at once, 50,000 verified, 50,000 not, as asked, "), "{text}");
}

#[test]
fn the_json_summary_has_the_same_figures_and_is_printed_without_writing_a_file() {
    let fixture = Fixture::one_host();
    fixture.set("client.json", "limit", json!("server"));
    fixture.set("client.json", "limit_detail", json!("\u{9b}1m"));
    let files = || fs::read_dir(fixture.path()).unwrap().count();
    let before = files();
    let printed = stdout(&fixture.summarize(&["--format", "json"]));
    let page = stdout(&fixture.summarize(&["--format", "markdown"]));
    assert_eq!(files(), before);
    assert_eq!(stdout(&fixture.summarize(&[])).lines().count(), 5);
    assert_eq!(printed, fixture.read("summary.json"));
    assert_eq!(page, fixture.read("summary.md"));

    assert!(!printed.contains('\u{9b}'));
    let summary: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(summary["schema"], "c1000k.summary/1");
    assert_eq!(summary["verdict"], "reached");
    assert_eq!(summary["held_at_once"], 100_000);
    assert_eq!(summary["missing"], json!([]));
    assert_eq!(summary["clients"][0]["limit_detail"], "\u{9b}1m");
    assert_eq!(summary["machine"]["where"], "vm");
    let checks = summary["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["outcome"] == "agrees"), "{checks:?}");

    fixture.remove("server.json");
    let output = fixture.summarize(&["--format", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let summary: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((&summary["missing"], &summary["server"]), (&json!(["server"]), &json!(null)));
}

#[test]
fn the_verdict_is_printed_if_nothing_can_be_written() {
    let fixture = Fixture::one_host();
    // A directory has the name of the file, so even root can't write it.
    fixture.put("summary.md/file", "");
    let output = fixture.summarize(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).starts_with("Reached: 100,000"), "{}", stdout(&output));
    assert!(!stdout(&output).contains("summary.md"), "it was not written: {}", stdout(&output));
    assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
}

#[test]
fn a_run_without_verification_is_reported_as_held() {
    let fixture = Fixture::one_host();
    fixture.set("client.json", "verified", json!(null));
    fixture.set("client.json", "verified_passes", json!([]));
    fixture.set("client.json", "verdict", json!("held"));
    assert_unknown(&fixture, "Echoes of client");
    let text = stdout(&fixture.summarize(&[]));
    assert!(text.starts_with("Held, not verified: 100,000 of 100,000"), "{text}");
    assert!(text.contains("none verified, as asked"), "{text}");
    fixture.set("client.json", "verdict", json!("reached"));
    assert_disagrees(&fixture, "Verdict of client");
}

#[test]
fn a_short_run_names_its_limit_and_its_checks_agree() {
    let fixture = Fixture::one_host();
    fixture.set("client.json", "target", json!(2_500_000));
    fixture.set("client.json", "verdict", json!("short"));
    fixture.set("client.json", "limit", json!("memory"));
    fixture.set("client.json", "limit_detail", json!("the kernel had no memory left"));
    let output = fixture.summarize(&["--check"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(" 0 disagree, 0 unknown"), "{text}");
    assert!(text.starts_with("Short: 100,000 of 2,500,000"), "{text}");
    assert!(text.contains("Capped by memory (client): the kernel had no memory left"), "{text}");
}

#[test]
fn a_truncated_record_a_missing_directory_and_an_empty_one_give_one_line_and_exit_2() {
    let fixture = Fixture::one_host();
    let cut = fixture.read("client.json")[..200].to_owned();
    fixture.put("client.json", &cut);
    let empty = tempfile::tempdir().unwrap();
    let folders = [fixture.path(), empty.path(), &empty.path().join("none")];
    for folder in folders.map(|folder| folder.to_str().unwrap()) {
        for arguments in [vec!["summarize", folder], vec!["compare", folder, folder]] {
            let output = report(&arguments);
            assert_eq!(output.status.code(), Some(2), "{arguments:?}");
            assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
            assert!(stderr(&output).contains(folder), "{}", stderr(&output));
        }
    }
    assert!(!fixture.exists("summary.md"));
}

#[test]
fn malformed_text_files_are_ignored() {
    let fixture = Fixture::one_host();
    for name in ["slabinfo", "sockstat", "netstat", "meminfo", "server-smaps_rollup"] {
        for moment in ["before", "peak", "after"] {
            fixture.put(&format!("snapshots/one/{moment}/{name}"), "TCP: inuse x\n: : :\nTcpExt:");
        }
    }
    fixture.put("machine.txt", "no colon\n: no key\n|bar|: a|b\n");
    assert_unknown(&fixture, "Sockets of host one");
}

/// Pipes, devices and directories in place of each file that is read: all at once for those that may be missing.
#[test]
fn a_pipe_or_a_device_in_place_of_a_file_does_not_block() {
    let optional = ["machine.txt", "snapshots/one/peak/slabinfo", "snapshots/one/peak/sockstat"];
    for record in [Some("client.json"), Some("server.json"), Some("client-2.json"), None] {
        let fixture = Fixture::one_host();
        for name in optional.into_iter().filter(|_| record.is_none()).chain(record) {
            if fixture.exists(name) {
                fixture.remove(name);
            }
            fixture.pipe(name);
        }
        fixture.link("/dev/zero", "snapshots/one/after/meminfo");
        let output = fixture.summarize(&[]);
        let printed = stderr(&output);
        match record {
            Some(name) => {
                assert_eq!(output.status.code(), Some(2), "{name}: {printed}");
                assert!(
                    printed.contains(&format!("{name}: it is not a regular file")),
                    "{printed}"
                );
            }
            None => assert_eq!(output.status.code(), Some(0), "{printed}"),
        }
    }
    let fixture = Fixture::one_host();
    fixture.remove("client.json");
    fixture.link("/dev/zero", "client.json");
    assert_eq!(fixture.summarize(&[]).status.code(), Some(2));
}

#[test]
fn the_html_page_needs_no_other_file() {
    let fixture = Fixture::one_host();
    fixture.set("client.json", "connect_histogram", json!(HISTOGRAM));
    assert_eq!(fixture.summarize(&[]).status.code(), Some(0));
    let page = fixture.read("report.html");
    assert!(page.starts_with("<!doctype html>"), "{page}");
    assert!(page.contains("<title>100,000 connections, one-host</title>"), "{page}");
    for title in [
        "Connections over time",
        "Latency at each percentile",
        "What a connection costs",
        "Memory against connections",
    ] {
        assert!(page.contains(title), "{title}");
    }
    assert_eq!(page.matches("<svg").count(), 6);
    assert!(!page.contains("<p><figure") && !page.contains("</figure>\n</p>"), "{page}");
    assert_eq!(page.matches("<p>").count(), page.matches("</p>").count(), "{page}");
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("@media print"));
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!outside.contains("://") && !outside.contains("src="), "{outside}");
    let output = fixture.summarize(&["--format", "html"]);
    assert_eq!(stdout(&output), page);
}

/// Text that a terminal, Markdown or HTML would interpret, in every string that is read and in every name.
#[test]
fn text_from_records_has_no_effect_on_a_terminal_or_a_page() {
    const HOSTILE: &str =
        "\u{1b}[2J\u{9b}1m\r\nReached: all\u{202e}<script>alert(1)</script>![i](http://h)**b**|`";
    let in_name = HOSTILE.replace('/', ":");
    let fixture = Fixture::one_host();
    fixture.set("client.json", "verdict", json!("short"));
    fixture.set("client.json", "established", json!(99_999));
    fixture.set("client.json", "limit", json!("other"));
    let threshold = json!({"expression": HOSTILE, "value": 0, "passed": true});
    fixture.set("client.json", "thresholds", json!([threshold]));
    for field in ["limit_detail", "destination", "version", "started_at"] {
        fixture.set("client.json", field, json!(HOSTILE));
    }
    for record in ["client.json", "server.json"] {
        fixture.set(record, "argv", json!([HOSTILE, HOSTILE]));
    }
    for field in ["bind", "mode"] {
        fixture.set("server.json", field, json!(HOSTILE));
    }
    fixture.put(&format!("client-{in_name}.json"), &fixture.read("client.json"));
    let machine = fixture.read("machine.txt").replace("kernel: ", &format!("kernel: {HOSTILE}"));
    fixture.put("machine.txt", &format!("{machine}{HOSTILE}: {HOSTILE}\ntopology: {HOSTILE}\n"));
    let name: String = HOSTILE.split_whitespace().collect();
    for (moment, objects) in [("before", 10), ("peak", 900_000), ("after", 10)] {
        let file = format!("snapshots/one/{moment}/slabinfo");
        let line = format!(
            "{name} {objects} {objects} 64 64 1 : tunables 0 0 0 : slabdata 1 {objects} 0\n"
        );
        fixture.put(&file, &(fixture.read(&file) + &line));
        fixture.put(&format!("snapshots/{in_name}/{moment}/slabinfo"), &fixture.read(&file));
    }

    let output = fixture.summarize(&[]);
    let pages = [fixture.read("summary.md"), fixture.compare_with_itself()];
    let drawn = ["rate.svg", "cost.svg"].map(|name| fixture.read(name));
    let printed = [stdout(&output), stderr(&output)];
    for text in pages.iter().chain(&drawn).chain(&printed) {
        let acts = |&c: &char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert_eq!(text.chars().find(acts), None, "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("Reached: all")), "{text}");
    }
    let html = fixture.read("report.html");
    for page in pages.iter().chain(&drawn).chain([&html]) {
        assert!(!page.contains("<script") && !page.contains("<img"), "{page}");
    }
    assert!(!html.contains("<a ") && !html.contains("<b>"), "{html}");
    for page in &pages {
        let unescaped = page.replace("\\`", "").replace("\\*", "").replace("\\[", "");
        assert!(!unescaped.contains("![i]") && !unescaped.contains("**b**"), "{page}");
        assert!(!unescaped.contains('`'), "{page}");
    }
    assert!(pages[0].contains("\\\\u{1b}\\[2J"), "the text is still shown: {}", pages[0]);

    fixture.put("client-2.json", &format!(r#"{{"schema": "{}"}}"#, "\\u001b[2J\\u009b"));
    fixture.put("client-3.json", "{}");
    let printed = stderr(&fixture.summarize(&[]));
    assert!(
        printed.lines().count() == 1 && !printed.trim_end().chars().any(char::is_control),
        "{printed:?}"
    );
}

#[test]
fn a_large_file_does_not_make_the_page_long() {
    let fixture = Fixture::one_host();
    fixture.set("client.json", "verified_passes", json!(vec![100_000; 300_000]));
    let lines = "key: value\n".repeat(300_000);
    fixture.put("machine.txt", &format!("{lines}long: {}\n", "x".repeat(500_000)));
    fixture.set("client.json", "argv", json!(vec!["y"; 300_000]));
    let threshold = json!({"expression": "lost>0", "value": 0, "passed": true});
    fixture.set("client.json", "thresholds", json!(vec![threshold; 300_000]));
    let output = fixture.summarize(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let page = fixture.read("summary.md");
    assert!(page.len() < 100_000 && page.contains("299,901 lines more"), "{}", page.len());
    assert!(stdout(&output).len() < 10_000);
}

#[test]
fn more_verified_than_held_or_held_than_attempted_is_a_contradiction() {
    for (field, figure) in [("verified", 9_200_000_000_000_000_000_u64), ("attempted", 99_999)] {
        let fixture = Fixture::one_host();
        fixture.set("client.json", field, json!(figure));
        let output = fixture.summarize(&[]);
        assert!(stdout(&output).starts_with("Contradicted: "), "{field}: {}", stdout(&output));
        assert_eq!(output.status.code(), Some(1), "{field}");
    }
}

#[test]
fn negative_times_are_refused_in_one_line() {
    for field in ["ramp_seconds", "hold_seconds"] {
        let fixture = Fixture::one_host();
        fixture.set("client.json", field, json!(-1));
        let output = fixture.summarize(&[]);
        assert_eq!(output.status.code(), Some(2), "{field}");
        let text = stderr(&output);
        assert!(text.contains("not a valid record") && text.lines().count() == 1, "{text}");
    }
}

#[test]
fn another_server_leaves_no_record_and_the_run_passes_as_client_only() {
    let fixture = Fixture::one_host();
    fixture.remove("server.json");
    assert_eq!(fixture.summarize(&[]).status.code(), Some(1));
    let output = fixture.summarize(&["--client-only"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    assert!(stdout(&output).contains("\nMissing: server.json\n"), "{}", stdout(&output));
    fixture.set("client.json", "verdict", json!("short"));
    fixture.set("client.json", "established", json!(99_999));
    assert_eq!(fixture.summarize(&["--client-only"]).status.code(), Some(1));
}

#[test]
fn several_targets_have_a_table_of_their_parts() {
    let fixture = Fixture::one_host();
    let part = |target: &str, established: u64| {
        json!({"target": target, "attempted": established + 7, "established": established,
            "failed": 3, "lost": 2})
    };
    fixture.set("client.json", "targets", json!([part("tcp://127.0.0.1", 100_000)]));
    fixture.summarize(&[]);
    assert!(!fixture.read("summary.md").contains("## Targets"));
    let parts = json!([part("tcp://127.0.0.1", 60_000), part("unix:/a|b", 40_000)]);
    fixture.set("client.json", "targets", parts);
    fixture.summarize(&[]);
    let page = fixture.read("summary.md");
    let row = page.lines().find(|line| line.contains("unix:/a")).unwrap();
    for figure in ["| client ", " 40,000 |", " 40,007 |", " 3 |", " 2 |"] {
        assert!(row.contains(figure), "{figure}: {row}");
    }
    assert!(page.contains("## Targets") && page.contains("60,000"), "{page}");
    assert!(fixture.read("report.html").contains("<h2>Targets</h2>"));
    let path = fixture.path().to_str().unwrap();
    let compared = stdout(&report(&["compare", path, path, "--format", "markdown"]));
    assert_eq!(compared.matches("40,007").count(), 2, "{compared}");
}

#[test]
fn memory_that_shrank_is_not_shown() {
    let fixture = Fixture::one_host();
    fixture.remove("snapshots");
    let layers = json!({"kernel": -1_512.5, "tls": 0, "protocol": 24, "client": 40});
    fixture.set("client.json", "connection_bytes", layers);
    fixture.set("server.json", "kernel_bytes_per_connection", json!(-1_513));
    fixture.summarize(&[]);
    for name in ["summary.md", "summary.json", "summary.csv", "report.html"] {
        let text = fixture.read(name);
        assert!(!text.contains("-1,51") && !text.contains("-151"), "{name}: {text}");
    }
}

#[test]
fn a_ratio_that_is_not_finite_is_not_shown() {
    let [first, second] = [Fixture::one_host(), Fixture::one_host()];
    first.set("client.json", "ramp_seconds", json!(1e-9));
    second.set("client.json", "ramp_seconds", json!(1e308));
    let [first, second] = [&first, &second].map(|fixture| fixture.path().to_str().unwrap());
    let compared = stdout(&report(&["compare", first, second]));
    assert!(compared.lines().any(|line| line.starts_with("| ramp")), "{compared}");
    assert!(!compared.contains("inf"), "{compared}");
}

#[test]
fn extreme_figures_and_names_cause_no_failure() {
    let fixture = Fixture::one_host();
    let most = u64::MAX;
    for field in ["target", "attempted", "established", "verified", "failed", "lost", "retried"] {
        fixture.set("client.json", field, json!(most));
    }
    fixture.set("client.json", "verified_passes", json!([most, 0, most]));
    fixture.set("client.json", "ramp_seconds", json!(1e308));
    fixture.set("client.json", "connects_per_second", json!(-1e308));
    let ramp: Vec<_> = (0..50)
        .map(|at| json!({"seconds": 1e300 * f64::from(at), "established": most / 50}))
        .collect();
    fixture.set("client.json", "ramp_series", json!(ramp));
    fixture.put("client-<&|>.json", &fixture.read("client.json"));
    for field in ["accepted", "peak", "open", "closed", "refused", "rss_at_peak_bytes"] {
        fixture.set("server.json", field, json!(most));
    }
    let series: Vec<_> = [-1e308, 0.0, 1e-300, 1.7e308]
        .map(|at| json!({"seconds": at, "open": most, "rss_bytes": most}))
        .into();
    fixture.set("server.json", "series", json!(series));
    let slab =
        format!("TCP {most} {most} {most} {most} {most} : tunables 0 0 0 : slabdata 0 {most}");
    fixture.put("snapshots/one/peak/slabinfo", &format!("{slab} 0\nTCPv6{}", &slab[3..]));

    let output = fixture.summarize(&[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    assert!(!fixture.read("summary.md").contains("NaN"));
}

/// `REPORT_FUZZ_ROUNDS` sets the number of rounds, `REPORT_FUZZ_SEED` the seed.
#[test]
fn however_a_run_is_damaged_the_report_ends_with_an_error_or_a_page() {
    let asked = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let mut random = asked("REPORT_FUZZ_SEED").unwrap_or(0x2545_f491_4f6c_dd1d_u64).max(1);
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    let snapshot = "snapshots/one/peak";
    let files = [
        "client.json".to_owned(),
        "server.json".to_owned(),
        "machine.txt".to_owned(),
        format!("{snapshot}/slabinfo"),
        format!("{snapshot}/sockstat"),
        format!("{snapshot}/netstat"),
        format!("{snapshot}/server-smaps_rollup"),
    ];
    let parts = ["", "0", "-1", "1e400", "18446744073709551616", "null", "\"", "{", "\n", "\u{0}"];
    for _ in 0..asked("REPORT_FUZZ_ROUNDS").unwrap_or(40) {
        let fixture = Fixture::one_host();
        let file = &files[next(files.len())];
        for _ in 0..=next(3) {
            let whole = fixture.read(file).into_bytes();
            let start = next(whole.len() + 1);
            let end = (start + next(12)).min(whole.len());
            let damaged = [&whole[..start], parts[next(parts.len())].as_bytes(), &whole[end..]];
            fixture.put(file, &String::from_utf8_lossy(&damaged.concat()));
        }
        let output = fixture.summarize(&[]);
        let (code, printed) = (output.status.code(), stderr(&output));
        assert!(matches!(code, Some(0..=2)), "{file}: {printed}\n{}", fixture.read(file));
        assert_eq!(printed.lines().count(), usize::from(code == Some(2)), "{file}: {printed}");
    }
}

#[test]
fn a_standard_output_that_can_not_be_written_is_an_error() {
    let fixture = Fixture::one_host();
    let folder = fixture.path().to_str().unwrap();
    for asked in [
        "summarize \"$1\" --format json",
        "summarize \"$1\" --format markdown",
        "compare \"$1\" \"$1\"",
    ] {
        let nowhere = "closed at the start or is /dev/null";
        let not_written = "cannot write to standard output: ";
        for (closing, code, line) in [
            ("1</dev/null", 1, not_written),
            ("1>/dev/full", 1, not_written),
            ("1>&-", 0, nowhere),
            ("1<>/dev/null", 0, nowhere),
            ("1>/dev/null", 0, ""),
        ] {
            let script = format!("exec \"$0\" {asked} {closing}");
            let output = Command::new("bash")
                .args(["-c", &script, env!("CARGO_BIN_EXE_c1000k-report"), folder])
                .output()
                .unwrap();
            assert_eq!(output.status.code(), Some(code), "{script}: {}", stderr(&output));
            let lines = usize::from(!line.is_empty());
            assert!(stderr(&output).contains(line), "{script}: {}", stderr(&output));
            assert_eq!(stderr(&output).lines().count(), lines, "{script}: {}", stderr(&output));
        }
    }
    // Here the output is the files.
    let script = "exec \"$0\" summarize \"$1\" 1>&-";
    let status = Command::new("bash")
        .args(["-c", script, env!("CARGO_BIN_EXE_c1000k-report"), folder])
        .status()
        .unwrap();
    assert!(status.success() && fixture.exists("summary.json"));
    fixture.remove("summary.json");
    let script = "exec \"$0\" summarize \"$1\" 1>/dev/full";
    let output = Command::new("bash")
        .args(["-c", script, env!("CARGO_BIN_EXE_c1000k-report"), folder])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot write to standard output: "), "{}", stderr(&output));
    assert!(fixture.exists("summary.json"));
}

#[test]
fn wrong_usage_is_exit_2() {
    for arguments in [&[][..], &["summarize"], &["bogus"], &["compare", "one"]] {
        let output = report(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let errors = stderr(&output);
        let is_claps = errors.starts_with("error: ") && errors.contains("\nUsage: ");
        assert!(is_claps, "{arguments:?}: {errors}");
    }
}

#[test]
fn two_runs_are_compared_by_ratios() {
    let (first, second) = (Fixture::one_host(), Fixture::three_hosts());
    second.set("server.json", "cpu_user_seconds", json!(0.2));
    let output = fixture::report(&[
        "compare",
        first.path().to_str().unwrap(),
        second.path().to_str().unwrap(),
    ]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let row = text.lines().find(|line| line.contains("server's CPU, user")).unwrap();
    assert!(row.trim_end().ends_with("0.500 |"), "{text}");
    let row = text.lines().find(|line| line.contains("held at once")).unwrap();
    assert_eq!(row.matches("100,000").count(), 2, "{text}");
    assert!(!text.contains("noise"), "one run each shows none: {text}");
}

#[test]
fn series_of_runs_are_compared_by_their_medians_and_their_noise() {
    let series = |seconds: [f64; 3]| {
        let folder = tempfile::tempdir().unwrap();
        for (number, cpu) in seconds.into_iter().enumerate() {
            let run = Fixture::one_host();
            run.set("server.json", "cpu_user_seconds", json!(cpu));
            let to = folder.path().join(format!("run-{number}"));
            fs::create_dir(&to).unwrap();
            for name in ["client.json", "server.json"] {
                fs::copy(run.path().join(name), to.join(name)).unwrap();
            }
        }
        folder
    };
    let (first, second) = (series([1.0, 1.1, 0.9]), series([2.0, 2.0, 2.1]));
    let paths = [first.path().to_str().unwrap(), second.path().to_str().unwrap()];
    let compare = |format: &str| {
        let output = fixture::report(&["compare", paths[0], paths[1], "--format", format]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    let object: Value = serde_json::from_str(&compare("json")).unwrap();
    let cpu = &object["figures"]["server's CPU, user"];
    assert_eq!(
        (&cpu["first"], &cpu["second"], &cpu["ratio"]),
        (&json!(1.0), &json!(2.0), &json!(2.0))
    );
    assert!((cpu["noise"].as_f64().unwrap() - 0.2).abs() < 1e-9, "{cpu}");
    assert_eq!(object["runs"], json!([3, 3]));
    let page = compare("html");
    assert!(page.starts_with("<!doctype html>") && page.contains("noise</th>"), "{page}");
    assert!(page.contains("Medians of 3 and 3 runs"), "{page}");
    assert!(compare("markdown").contains(" 20.0% |"), "{}", compare("markdown"));
    let lines = compare("csv");
    assert!(lines.starts_with("figure,first,second,ratio,noise,"), "{lines}");
    assert!(lines.contains("\"server's CPU, user\",1,2,2,0.2"), "{lines}");
    assert!(lines.contains(",beyond,seconds,0.9,1.1,3,2,2.1,3\n"), "{lines}");
    assert_eq!(
        (&cpu["difference"], &cpu["unit"], &cpu["first_min"], &cpu["second_runs"]),
        (&json!("beyond"), &json!("seconds"), &json!(0.9), &json!(3))
    );
    assert_eq!(object["figures"]["held at once"]["difference"], "within");
    assert!(page.contains("1.00 s (900.0 ms to 1.10 s)"), "{page}");
    assert!(page.contains("beyond the noise</td>") && page.contains("<h2>Runs</h2>"), "{page}");
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    assert!(page.contains("run-2</td>") && !outside.contains("://"), "{page}");
    assert!(page.contains("<h2>Charts</h2>") && page.matches("<svg").count() == 2, "{page}");
    assert!(!compare("markdown").contains("]("), "it is printed without files beside it");
    let points = compare("series");
    assert!(points.starts_with("run,program,seconds,connections,"), "{points}");
    assert_eq!(points.lines().count(), 1 + 6 * (40 + 61), "{points}");

    // With one run on a side its noise is unknown.
    let single = Fixture::one_host();
    let single = single.path().to_str().unwrap();
    let text = stdout(&fixture::report(&["compare", paths[0], single, "--format", "json"]));
    let object: Value = serde_json::from_str(&text).unwrap();
    let figures = object["figures"].as_object().unwrap();
    assert!(figures.values().all(|figure| figure["difference"] == "unknown"), "{text}");
    assert!(
        stdout(&fixture::report(&["compare", paths[0], single])).contains("| unknown"),
        "{text}"
    );

    // A broken record is an error, and does not reduce the number of runs.
    fs::write(first.path().join("run-1/client.json"), "{}").unwrap();
    let output = fixture::report(&["compare", paths[0], paths[1]]);
    assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
    assert!(stderr(&output).contains("run-1"), "{}", stderr(&output));
}

#[test]
fn the_figures_are_exported_for_a_spreadsheet() {
    let fixture = Fixture::one_host();
    let text = stdout(&fixture.summarize(&["--format", "csv"]));
    assert!(text.starts_with("figure,value\nasked for,100000\n"), "{text}");
    fixture.summarize(&[]);
    assert_eq!(fixture.read("summary.csv"), text);
}

#[test]
fn the_figures_over_time_are_a_separate_table() {
    let fixture = Fixture::one_host();
    let point = json!({"seconds": 0.5, "established": 7, "failures": {"ETIMEDOUT": 2, "EOF": 1},
        "lost": 1, "connect_p50_us": 90, "connect_p99_us": 300, "cpu_seconds": 0.25,
        "machine_busy_seconds": 9.5, "machine_softirq_seconds": null});
    fixture.set("client.json", "ramp_series", json!([point]));
    fixture.set("client.json", "hold_series", json!([{"seconds": 9.0, "established": 6}]));
    fixture.summarize(&[]);
    let rows = fixture.read("series.csv");
    let lines: Vec<&str> = rows.lines().collect();
    assert!(lines[0].ends_with(",machine_softirq_seconds,failed_EOF,failed_ETIMEDOUT"), "{rows}");
    assert_eq!(lines[1], "client,0.5,7,3,1,,90,300,,,0.25,9.5,,1,2");
    assert_eq!(lines[2], "client,9,6,,,,,,,,,,,,");
    assert_eq!(lines[3], "server,0,0,,,,,,1000000,0,,,,,");
    assert_eq!(lines.len(), 3 + 61);
    assert_eq!(stdout(&fixture.summarize(&["--format", "series"])), rows);
}

#[test]
fn errors_and_cpu_time_have_their_tables_and_charts() {
    let fixture = Fixture::one_host();
    fixture.summarize(&[]);
    let page = fixture.read("summary.md");
    assert!(!page.contains("## Errors") && !page.contains("## CPU time"), "{page}");
    assert!(!fixture.exists("errors.svg") && !fixture.exists("processors.svg"));

    let point = |at: u64| {
        json!({"seconds": at, "established": 2_500 * at, "failures": {"ETIMEDOUT": at / 2},
            "lost": 0, "connect_p50_us": 100 * at, "connect_p99_us": 300 * at,
            "cpu_seconds": at as f64 * 0.75, "machine_busy_seconds": 100.0 + 1.5 * at as f64,
            "machine_softirq_seconds": 10.0 + 0.5 * at as f64})
    };
    let points = (0..=40).map(point);
    fixture.set("client.json", "ramp_series", points.collect());
    for (field, value) in [
        ("failures", json!({"ETIMEDOUT": 20})),
        ("processors", json!(2)),
        ("cpu_user_seconds", json!(10.0)),
        ("cpu_system_seconds", json!(30.0)),
        ("ramp_cpu_seconds", json!(30.0)),
    ] {
        fixture.set("client.json", field, value);
    }
    fixture.summarize(&[]);
    let page = fixture.read("summary.md");
    let row = |of: &str| page.lines().find(|line| line.starts_with(of)).unwrap_or_default();
    assert!(row("| client  | attempts failed, ETIMEDOUT").contains(" 20 |"), "{page}");
    let of_client = |line: &&str| line.starts_with("| client ") && line.contains("30.00 s");
    assert!(page.lines().find(of_client).unwrap().ends_with(" 75.0% |"), "{page}");
    assert!(row("| machine, all processors").ends_with("75.0% |"), "{page}");
    assert!(row("| machine, soft interrupts").ends_with("25.0% |"), "{page}");
    for (chart, text) in [
        ("errors.svg", "client, ETIMEDOUT"),
        ("processors.svg", "machine, soft interrupts"),
        ("connect-latency.svg", "client, p99"),
        ("memory-growth.svg", "kernel, sockets"),
    ] {
        assert!(fixture.read(chart).contains(text), "{chart}");
        assert!(page.contains(&format!("]({chart})")), "{page}");
    }
}

#[test]
fn the_memory_of_a_connection_is_shown_by_layer() {
    let fixture = Fixture::one_host();
    assert!(!stdout(&fixture.summarize(&["--format", "markdown"])).contains("By layer"));
    fixture.set("client.json", "protocol", json!("wss"));
    let layers = json!({"kernel": 3_850.0, "tls": 1_312, "protocol": 24, "client": 40});
    fixture.set("client.json", "connection_bytes", layers.clone());
    fixture.set("client.json", "process_bytes_per_connection", json!(9_876.5));
    fixture.set("server.json", "kernel_bytes_by_slab", json!({"TCP": 500_000_000, "other": 2}));
    let row = |page: &str, end: &str, layer: &str| {
        let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect();
        let mut rows = page.lines().map(|line| -> Vec<String> { cells(line) });
        let row = rows.find(|cells| cells.len() == 6 && cells[1] == end && cells[2] == layer);
        row.map(|cells| cells[3].clone())
    };
    let client = |page: &str| {
        ["kernel", "TLS", "wss", "client", "whole process"].map(|layer| row(page, "client", layer))
    };
    let shown = ["3,850 B", "1,312 B", "24.0 B", "40.0 B", "9,877 B"];
    let shown = shown.map(|text| Some(text.to_owned()));
    let page = stdout(&fixture.summarize(&["--format", "markdown"]));
    assert_eq!(client(&page), shown, "{page}");
    assert_eq!(row(&page, "server", "whole process").unwrap(), "24.6 B");
    assert_eq!(row(&page, "server", "kernel, TCP"), None, "the snapshots have it");
    let summary: Value =
        serde_json::from_str(&stdout(&fixture.summarize(&["--format", "json"]))).unwrap();
    assert_eq!(summary["clients"][0]["connection_bytes"], layers);

    fixture.remove("snapshots");
    let page = stdout(&fixture.summarize(&["--format", "markdown"]));
    assert_eq!(client(&page), shown, "{page}");
    assert_eq!(row(&page, "server", "kernel").unwrap(), "3,850 B");
    // Of 100,000 connections with both ends in this kernel.
    assert_eq!(row(&page, "server", "kernel, TCP").unwrap(), "2,500 B");
    assert_eq!(row(&page, "server", "kernel, other"), None);
    fixture.set("server.json", "kernel_bytes_by_slab", json!({"TCP": 5_000_000_000_u64}));
    let page = stdout(&fixture.summarize(&["--format", "markdown"]));
    assert_eq!(row(&page, "server", "kernel, TCP"), None, "other processes have grown it");

    fixture.set("client.json", "established", json!(999));
    let page = stdout(&fixture.summarize(&["--format", "markdown"]));
    assert_eq!(row(&page, "client", "whole process"), None, "too few to measure one");
}

fn workload(sent: u64, p99: u64) -> Value {
    json!({
        "connections": 100_000, "period_seconds": 60.0, "seconds": 60.0, "sent": sent,
        "answered": 100_000, "mismatched": 0, "unanswered": 0, "late": 7,
        "latency_us": {"p50": 150, "p90": 300, "p99": p99, "p999": 9_000, "p9999": 12_500, "max": 20_000},
        "histogram": null
    })
}

#[test]
fn messages_and_thresholds_have_their_tables_and_their_check() {
    let fixture = Fixture::one_host();
    fixture.set("client.json", "workload", workload(100_000, 2_500));
    let threshold = json!({"expression": "echo.p99>2ms", "value": 2_500, "passed": false});
    fixture.set("client.json", "thresholds", json!([threshold]));
    let output = fixture.summarize(&["--check"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    let page = fixture.read("summary.md");
    assert!(page.contains("## Messages during the hold"), "{page}");
    let row = page.lines().find(|line| line.contains("12.5 ms")).unwrap();
    assert!(row.contains("| 2.5 ms |") && row.contains("| 1 min 00 s |"), "{row}");
    let row = page.lines().find(|line| line.contains("echo.p99")).unwrap();
    assert!(row.contains("2,500") && row.contains("FAIL"), "{row}");
    let summary: Value = serde_json::from_str(&fixture.read("summary.json")).unwrap();
    assert_eq!(summary["clients"][0]["workload"]["late"], 7);

    fixture.set("client.json", "workload", workload(100_001, 2_500));
    assert_disagrees(&fixture, "Messages of client");
}

#[test]
fn latencies_of_messages_are_compared() {
    let (first, second) = (Fixture::one_host(), Fixture::one_host());
    first.set("client.json", "workload", workload(100_000, 2_000));
    second.set("client.json", "workload", workload(100_000, 3_000));
    let output = fixture::report(&[
        "compare",
        first.path().to_str().unwrap(),
        second.path().to_str().unwrap(),
    ]);
    let text = stdout(&output);
    let row = text.lines().find(|line| line.contains("echo latency, p99 ")).unwrap();
    assert!(row.trim_end().ends_with("1.500 |"), "{text}");
}

#[test]
fn churn_and_a_storm_have_a_table_and_may_raise_the_peak_of_the_server() {
    let fixture = Fixture::one_host();
    let latency = json!({"p50": 1_000, "p90": 2_000, "p99": 3_500, "p999": 4_000, "max": 5_000});
    let churn = json!({"closed": 777, "reopened": 776, "connect_latency_us": latency});
    let storm = json!({
        "dropped": 100_000, "back": 99_999, "drop_seconds": 1.5, "reopen_seconds": 6.25,
        "connect_latency_us": latency
    });
    fixture.set("client.json", "churn", churn);
    fixture.set("client.json", "storm", storm);
    fixture.set("server.json", "peak", json!(100_005));
    let output = fixture.summarize(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    let page = fixture.read("summary.md");
    for (what, figures) in [("churn", ["777", "776"]), ("storm", ["99,999", "6.25 s"])] {
        let row = page.lines().find(|line| line.contains(&format!("| {what} "))).unwrap();
        assert!(
            figures.iter().all(|figure| row.contains(figure)) && row.contains("3.5 ms"),
            "{row}"
        );
    }
    fixture.set("server.json", "peak", json!(99_999));
    assert_disagrees(&fixture, "Connections held at once");
}

#[test]
fn a_server_that_was_one_of_several_targets_is_not_compared_with_all_connections() {
    let fixture = Fixture::one_host();
    let target = |name: &str, held: u64| json!({"target": name, "attempted": held, "established": held, "failed": 0, "lost": 0});
    let targets = json!([target("127.0.0.1", 50_000), target("127.0.0.2", 50_000)]);
    fixture.set("client.json", "targets", targets);
    fixture.set("client.json", "destination", json!("127.0.0.1:9900, 127.0.0.2:9900"));
    let text = stdout(&fixture.summarize(&[]));
    assert!(text.contains(" 0 unknown"), "one server had all of them: {text}");
    for field in ["peak", "accepted", "closed"] {
        fixture.set("server.json", field, json!(50_000));
    }
    for check in ["Connections held at once", "Connections accepted", "Sockets of", "Slab objects"]
    {
        assert_unknown(&fixture, check);
    }
    assert!(fixture.read("summary.md").starts_with("# 100,000 connections"));
}

#[test]
fn unix_domain_sockets_are_not_compared_with_the_figures_of_tcp() {
    let fixture = Fixture::one_host();
    fixture.remove("server.json");
    fixture.set("client.json", "destination", json!("unix:/run/server.sock"));
    fixture.summarize(&[]);
    for check in ["Connections held at once", "Sockets of", "Slab objects"] {
        assert_row_unknown(&fixture, check);
    }
    assert!(fixture.read("summary.md").contains("do not include Unix-domain sockets"));
}
