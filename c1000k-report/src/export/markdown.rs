//! The page of a run: the verdict first, then the figures behind it.

use std::error::Error;
use std::fmt::Write;

use c1000k_host::format;
use c1000k_record::{ClientRecord, LatencyUs, Threshold};

use super::Export;
use crate::Report;
use crate::bottleneck::{busy_share, machine_shares};
use crate::chart::Chart;
use crate::checks::{CONNECTIONS_TO_WEIGH_MIN, Check, PASSES_MAX};
use crate::compare::Comparison;
use crate::cost::{self, HostCost, float};
use crate::escape::markdown;
use crate::run::{Moment, Run, Topology, total};
use crate::table::{columns, table, table_with_notes, text_table};
use crate::{targets, trend, verdict};

/// The maximum shown for each client.
const THRESHOLDS_MAX: usize = 100;

/// The maximum shown of each kind.
const ERRORS_MAX: usize = 50;

/// The maximum shown of a server's record.
const SLABS_MAX: usize = 20;

/// If the slabs grew by more than this multiple of a connection's memory, other processes caused it.
const SLABS_SHARE_MAX: f64 = 1.25;

/// How the kernel's memory of a connection is measured.
const SLABS: &str = "growth of its slabs, per socket";

/// `scripts/million` writes about ten; more are not shown.
const MACHINE_LINES_MAX: usize = 100;

/// The page, with links to the charts in the same directory.
#[derive(Debug)]
pub(super) struct Markdown;

impl Export for Markdown {
    fn file_name(&self) -> &'static str {
        "summary.md"
    }

    fn export(&self, report: &Report) -> Result<String, Box<dyn Error>> {
        Ok(page(&report.run, &report.checks, &report.charts))
    }

    fn compare(&self, comparison: &Comparison) -> Result<String, Box<dyn Error>> {
        Ok(comparison.page())
    }
}

fn page(run: &Run, checks: &[Check], charts: &[Chart]) -> String {
    let held = run.connections().map_or_else(|| "No".to_owned(), format::count);
    let topology = run.topology_known().map(|topology| format!(", {}", topology.name()));
    let topology = topology.unwrap_or_default();
    let sections = [
        format!("# {held} connections{topology}\n\n{}\n", paragraphs(run, checks)),
        machine(run),
        chart_section(charts),
        figures(run),
        clients(run),
        targets::section(std::slice::from_ref(run)),
        errors_section(run),
        processor_section(run),
        workload_section(run),
        reopened_section(run),
        thresholds(run),
        cost_section(run),
        original(run),
        checks_section(checks),
        rate_section(run),
        teardown(run),
    ];
    sections.into_iter().filter(|section| !section.is_empty()).collect::<Vec<_>>().join("\n")
}

/// The verdict as Markdown: each line a paragraph, the first one strong.
fn paragraphs(run: &Run, checks: &[Check]) -> String {
    let text = verdict::text(run, checks);
    let mut lines = text.lines().map(markdown);
    let mut page = format!("**{}**\n", lines.next().unwrap_or_default());
    for line in lines {
        let _ = write!(page, "\n{line}.\n");
    }
    page.replace("..\n", ".\n").trim_end().to_owned()
}

fn figures(run: &Run) -> String {
    let count = |figure: fn(&ClientRecord) -> u64| or_unknown(run.sum(figure).map(format::count));
    let mut rows = vec![
        row("asked for", count(|client| client.target)),
        row("held at once", or_unknown(run.connections().map(format::count))),
        row("attempted", count(|client| client.attempted)),
        row("retried", count(|client| client.retried)),
    ];
    if run.clients.iter().all(|(_, client)| !client.verified_passes.is_empty()) {
        rows.extend(passes(run));
    } else {
        rows.push(row("verified by echo", or_unknown(run.verified().map(format::count))));
        rows.push(row("not verified, as asked", format::count(run.unverified())));
    }
    rows.push(row("failed", count(|client| client.failed)));
    rows.push(row("lost", count(|client| client.lost)));
    if let Some(server) = &run.server {
        rows.extend([
            row("accepted by the server", format::count(server.accepted)),
            row("refused by the server", format::count(server.refused)),
            row("stale events, dropped", format::count(server.stale_events)),
            row("reactor threads of the server", number_or_unknown(server.threads)),
            row("server's CPU, user", format::duration(server.cpu_user_seconds)),
            row("server's CPU, system", format::duration(server.cpu_system_seconds)),
        ]);
    }
    let longest = |figure: fn(&ClientRecord) -> f64| {
        run.clients.iter().map(|(_, client)| figure(client)).fold(0.0, f64::max)
    };
    if !run.clients.is_empty() {
        rows.push(row("ramp", format::duration(longest(|client| client.ramp_seconds))));
        rows.push(row("hold", format::duration(longest(|client| client.hold_seconds))));
    }
    format!("## Requested and held\n\n{}", table(["", "count"], &rows))
}

fn passes(run: &Run) -> Vec<[String; 2]> {
    let count = run.clients.iter().map(|(_, client)| client.verified_passes.len()).max();
    let pass = |index: usize| {
        let verified = run.clients.iter().map(|(_, client)| client.verified_passes.get(index));
        let sum = total(verified.flatten().copied());
        row(&format!("verified by echo, pass {}", index + 1), format::count(sum))
    };
    (0..count.unwrap_or(0).min(PASSES_MAX)).map(pass).collect()
}

fn clients(run: &Run) -> String {
    let rows: Vec<_> = run
        .clients
        .iter()
        .map(|(name, client)| {
            let latency = client.connect_latency_us;
            let time = |us: Option<u64>| or_unknown(us.map(|us| format::duration(float(us) / 1e6)));
            [
                name.clone(),
                format::count(client.established),
                format::duration(client.ramp_seconds),
                format::rate(client.connects_per_second),
                time(latency.p50),
                time(latency.p99),
                time(latency.max),
            ]
        })
        .collect();
    let heading =
        ["client", "held", "ramp", "connects", "latency p50", "latency p99", "latency max"];
    if rows.is_empty() { String::new() } else { table(heading, &rows) }
}

/// Empty for a run without errors.
fn errors_section(run: &Run) -> String {
    let mut rows = Vec::new();
    let mut add = |program: &str, what: &str, count: u64| {
        if count > 0 {
            rows.push([program.to_owned(), what.to_owned(), format::count(count)]);
        }
    };
    for (name, client) in &run.clients {
        for (error, count) in client.failures.iter().take(ERRORS_MAX) {
            add(name, &format!("attempts failed, {error}"), *count);
        }
        add(name, "connections lost", client.lost);
    }
    if let Some(server) = &run.server {
        for (reason, count) in server.refused_by.iter().take(ERRORS_MAX) {
            add("server", &format!("connections refused, {reason}"), *count);
        }
        for (error, count) in server.accept_errors.iter().take(ERRORS_MAX) {
            add("server", &format!("accepts failed, {error}"), *count);
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let heading = ["program", "error", "count"];
    format!("## Errors\n\n{}", columns(heading, &rows, |column| column == 2))
}

/// Empty without the client's figures, which older records do not have.
fn processor_section(run: &Run) -> String {
    let mut rows = Vec::new();
    for (name, client) in &run.clients {
        let (Some(user), Some(system)) = (client.cpu_user_seconds, client.cpu_system_seconds)
        else {
            continue;
        };
        let seconds = client.ramp_seconds;
        let busy = client.ramp_cpu_seconds.filter(|_| seconds > 0.0).map(|cpu| cpu / seconds);
        rows.push(processor_row(name, Some([user, system]), busy));
    }
    if rows.is_empty() {
        return String::new();
    }
    if let Some(server) = &run.server {
        let total = [server.cpu_user_seconds, server.cpu_system_seconds];
        rows.push(processor_row("server, each thread", Some(total), busy_share(server)));
    }
    for (name, client) in &run.clients {
        let machine =
            if run.is_one_kernel() { "machine".into() } else { format!("machine of {name}") };
        let Some([busy, softirq]) = machine_shares(client) else { continue };
        rows.push(processor_row(&format!("{machine}, all processors"), None, Some(busy)));
        rows.push(processor_row(&format!("{machine}, soft interrupts"), None, Some(softirq)));
        if run.is_one_kernel() {
            break;
        }
    }
    let heading = ["", "user", "system", "busy during the ramp"];
    format!("## CPU time\n\n{}", table(heading, &rows))
}

fn processor_row(name: &str, total: Option<[f64; 2]>, busy: Option<f64>) -> [String; 4] {
    let [user, system] = match total {
        Some(total) => total.map(format::duration),
        None => ["-", "-"].map(str::to_owned),
    };
    [
        name.to_owned(),
        user,
        system,
        or_unknown(busy.map(|share| format::percent(share.clamp(0.0, 1.0)))),
    ]
}

/// The messages during the hold. Latencies are counted from the time a message was due.
fn workload_section(run: &Run) -> String {
    let of = |(name, client): &(String, ClientRecord)| {
        let workload = client.workload.as_ref()?;
        let latency = workload.latency_us;
        let time = |us: Option<u64>| or_unknown(us.map(|us| format::duration(float(us) / 1e6)));
        Some([
            name.clone(),
            format::count(workload.connections),
            format::duration(workload.period_seconds),
            format::count(workload.sent),
            format::count(workload.answered),
            time(latency.p50),
            time(latency.p99),
            time(latency.p999),
            time(latency.p9999),
            time(latency.max),
        ])
    };
    let rows: Vec<_> = run.clients.iter().filter_map(of).collect();
    if rows.is_empty() {
        return String::new();
    }
    let faults = |(name, client): &(String, ClientRecord)| {
        let workload = client.workload.as_ref()?;
        let counts = [workload.mismatched, workload.unanswered, workload.late, workload.skipped];
        let [mismatched, unanswered, late, skipped] = counts.map(format::count);
        Some([name.clone(), mismatched, unanswered, late, skipped])
    };
    let fault_rows: Vec<_> = run.clients.iter().filter_map(faults).collect();
    let fault_heading = ["client", "mismatched", "unanswered", "sent late", "skipped"];
    let heading =
        ["client", "senders", "every", "sent", "answered", "p50", "p99", "p99.9", "p99.99", "max"];
    format!(
        "## Messages during the hold\n\nEach latency is counted from the time the message was due, \
         even if it was sent later.\n\n{}\n{}",
        table(heading, &rows),
        table(fault_heading, &fault_rows)
    )
}

/// Churn and storms.
fn reopened_section(run: &Run) -> String {
    let row = |name: &str, what: &str, counts: [u64; 2], seconds: f64, latency: LatencyUs| {
        let time = |us: Option<u64>| or_unknown(us.map(|us| format::duration(float(us) / 1e6)));
        [
            name.to_owned(),
            what.to_owned(),
            format::count(counts[0]),
            format::count(counts[1]),
            format::duration(seconds),
            time(latency.p50),
            time(latency.p99),
            time(latency.max),
        ]
    };
    let mut rows = Vec::new();
    for (name, client) in &run.clients {
        if let Some(churn) = &client.churn {
            let counts = [churn.closed, churn.reopened];
            rows.push(row(name, "churn", counts, client.hold_seconds, churn.connect_latency_us));
        }
        if let Some(storm) = &client.storm {
            let counts = [storm.dropped, storm.back];
            rows.push(row(name, "storm", counts, storm.reopen_seconds, storm.connect_latency_us));
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let heading =
        ["client", "", "closed", "back", "in", "connect p50", "connect p99", "connect max"];
    format!("## Closed and reopened\n\n{}", table(heading, &rows))
}

fn thresholds(run: &Run) -> String {
    let of = |(name, client): &(String, ClientRecord)| -> Vec<[String; 4]> {
        let row = |threshold: &Threshold| {
            let value = threshold.value.map(|value| format::count(format::rounded(value)));
            let outcome = if threshold.passed { "pass" } else { "FAIL" };
            [name.clone(), threshold.expression.clone(), or_unknown(value), outcome.to_owned()]
        };
        client.thresholds.iter().take(THRESHOLDS_MAX).map(row).collect()
    };
    let rows: Vec<_> = run.clients.iter().flat_map(of).collect();
    let heading = ["client", "fails if", "measured (latencies in us)", ""];
    if rows.is_empty() {
        return String::new();
    }
    format!("## Thresholds\n\n{}", table(heading, &rows))
}

fn cost_section(run: &Run) -> String {
    let mut text = "## What a connection costs\n\n".to_owned();
    let memory = cost::process(run);
    let resident = [("before", memory.before_bytes), ("at the peak", memory.peak_bytes)];
    let resident = resident
        .map(|(moment, bytes)| bytes.map(|bytes| format!("{} {moment}", format::bytes(bytes))));
    let resident: Vec<_> = resident.into_iter().flatten().collect();
    let each = memory.bytes_each.map(|bytes| format!("{} a connection", format::bytes_each(bytes)));
    let resident = (!resident.is_empty()).then(|| format!("resident {}", resident.join(", ")));
    let known: Vec<_> = [each, resident].into_iter().flatten().collect();
    let known = or_unknown((!known.is_empty()).then(|| known.join("; ")));
    let _ = writeln!(text, "The server's process: {known}.\n");
    let kernels = cost::kernels(run);
    if kernels.iter().any(|cost| !cost.caches.is_empty()) {
        text.push_str(
            "The kernel merges caches whose objects have the same size, and shows them under the name \
             of one of them.\n\n",
        );
    }
    let mut blocks: Vec<String> = kernels.iter().map(kernel_cost).collect();
    if blocks.is_empty() {
        blocks.push(kernel_reported(run));
    }
    blocks.extend(layers(run));
    text + &blocks.join("\n")
}

/// The memory of a connection by layer, at the client's end and at the server's. `None` without a client's figures.
fn layers(run: &Run) -> Option<String> {
    let mut rows = Vec::new();
    let mut add = |end: &str, layer: &str, bytes: Option<f64>, note: &str| {
        rows.extend(bytes.map(|bytes| {
            [end.to_owned(), layer.to_owned(), format::bytes_each(bytes), note.to_owned()]
        }));
    };
    let mut has_layers = false;
    for (name, client) in &run.clients {
        // With few connections, the growth of the process is mostly that of its fixed parts.
        let is_weighed = client.established >= CONNECTIONS_TO_WEIGH_MIN;
        let process = client.process_bytes_per_connection.filter(|_| is_weighed);
        let Some(layers) = client.connection_bytes else { continue };
        has_layers = true;
        add(name, "kernel", layers.kernel.filter(|_| is_weighed), SLABS);
        add(
            name,
            "TLS",
            Some(float(layers.tls)).filter(|tls| *tls > 0.0),
            "session, size of the type",
        );
        let protocol = if client.protocol.is_empty() { "protocol" } else { &client.protocol };
        add(name, protocol, Some(float(layers.protocol)), "state, size of the type");
        add(name, "client", Some(float(layers.client)), "slot and state, sizes of the types");
        add(name, "whole process", process, "growth during the ramp, with all that it allocates");
    }
    let kernel =
        cost::server_end_bytes(run).or_else(|| run.server.as_ref()?.kernel_bytes_per_connection);
    add("server", "kernel", kernel, SLABS);
    // The snapshots have them in more detail.
    let mut slabs = cost::recorded_slabs(run);
    let total: f64 = slabs.iter().map(|(_, bytes)| bytes).sum();
    let is_shown = cost::kernels(run).is_empty()
        && run.server.as_ref().is_some_and(|server| server.peak >= CONNECTIONS_TO_WEIGH_MIN)
        && kernel.is_none_or(|kernel| total <= kernel * SLABS_SHARE_MAX);
    slabs.retain(|_| is_shown);
    for (name, bytes) in slabs.into_iter().take(SLABS_MAX) {
        add("server", &format!("kernel, {name}"), Some(bytes), "growth of this slab, per socket");
    }
    add("server", "whole process", cost::process(run).bytes_each, "growth from start to peak");
    has_layers.then(|| {
        let heading = ["end", "layer", "per connection", "measured as"];
        format!("By layer, at each end of a connection:\n\n{}", table_with_notes(heading, &rows))
    })
}

/// The kernel's memory as the server measured it, if there are no snapshots of the slabs.
fn kernel_reported(run: &Run) -> String {
    let reported = run.server.as_ref().and_then(|server| server.kernel_bytes_per_connection);
    let found = or_unknown(reported.map(|bytes| {
        format!("{} for one end of a connection, by the server's record", format::bytes_each(bytes))
    }));
    format!("The kernel: {found}; there are no snapshots of the host's slabs.\n")
}

fn kernel_cost(cost: &HostCost) -> String {
    let mut rows: Vec<_> = cost
        .caches
        .iter()
        .map(|cache| {
            [
                cache.name.clone(),
                format!("{:.2}", cache.objects),
                format!("{} B", format::count(cache.object_bytes)),
                format::bytes_each(cache.bytes),
            ]
        })
        .collect();
    let last = |name: &str, bytes: f64| {
        [name.to_owned(), String::new(), String::new(), format::bytes_each(bytes)]
    };
    rows.push(last("all other caches", cost.rest_bytes));
    rows.push(last("total", cost.bytes()));
    let mut text = format!(
        "The {}, by slab cache, pages included ({} connections):\n\n{}",
        markdown(&cost.name()),
        format::count(cost.connections),
        table(["cache", "objects", "object size", "per connection"], &rows)
    );
    if cost.ends == 2 {
        let _ = writeln!(text, "\nThat is {} an end.", format::bytes_each(cost.bytes() / 2.0));
    }
    let _ = writeln!(
        text,
        "\nOther processes change slabs too. By the caches that connections use, with one object of each cache \
         that all files share, one end takes {}.",
        format::bytes_each(cost.end_bytes)
    );
    text
}

/// The figures of the test that this software repeats beside those of this run, if its hosts are the same.
fn original(run: &Run) -> String {
    if run.topology() != Topology::ThreeHosts || run.is_one_kernel() {
        return String::new();
    }
    let memory = |host: &str| {
        let at = |moment| run.snapshot(host, moment).and_then(|seen| seen.memory_used_bytes);
        or_unknown(at(Moment::Peak).map(format::bytes))
    };
    let connections = or_unknown(run.connections().map(format::count));
    let rows = [
        ["kernel", "4.4", run.machine.value("kernel").unwrap_or("unknown")].map(str::to_owned),
        ["connections held".into(), "1,000,000".into(), connections],
        ["memory in use, server".into(), "2.6 GB".into(), memory("server")],
        ["memory in use, client 1".into(), "1.2 GB".into(), memory("client-1")],
        ["memory in use, client 2".into(), "1.2 GB".into(), memory("client-2")],
        ["the end".into(), "server killed, out of memory, at 1,150,000 (6 GB)".into(), end(run)],
    ];
    format!(
        "## Compared with the original test\n\n{}\nMemory in use is that of the whole host, without \
         free memory and caches.\n",
        table(["", "original test", "this run"], &rows)
    )
}

fn end(run: &Run) -> String {
    match (&run.server, run.snapshot("server", Moment::After)) {
        (Some(_), Some(_)) => "server still running after the teardown".to_owned(),
        (Some(_), None) => "server wrote its record".to_owned(),
        (None, _) => "unknown".to_owned(),
    }
}

fn checks_section(checks: &[Check]) -> String {
    let rows: Vec<_> = checks
        .iter()
        .map(|check| {
            let Check { name, expected, found, outcome, note, .. } = check;
            [name.clone(), expected.clone(), found.clone(), outcome.to_string(), note.clone()]
        })
        .collect();
    let heading = ["check", "expected", "found", "agrees", "what is checked"];
    format!("## Checks: client, server and kernel\n\n{}", text_table(heading, &rows))
}

fn rate_section(run: &Run) -> String {
    let mut rows = Vec::new();
    let mut ratios = String::new();
    for (name, client) in &run.clients {
        let Some(tenths) = trend::tenths(&client.ramp_series) else { continue };
        let mut row: [String; 11] = Default::default();
        row[0].clone_from(name);
        for (cell, rate) in row[1..].iter_mut().zip(tenths) {
            *cell = format::rate(rate);
        }
        rows.push(row);
        let _ = write!(
            ratios,
            "\nMedian of the last three over that of the first three ({}): {:.2}.\n",
            markdown(name),
            trend::ratio(&tenths)
        );
    }
    if rows.is_empty() {
        return String::new();
    }
    let heading = ["tenth", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"];
    format!("## Rate over the tenths of the ramp\n\n{}{ratios}", table(heading, &rows))
}

fn teardown(run: &Run) -> String {
    let mut rows = vec![row(
        "server's process",
        or_unknown(cost::process(run).share_returned().map(format::percent)),
    )];
    for cost in cost::kernels(run) {
        rows.push(row(
            &format!("slabs that only connections use, host {}", cost.host),
            or_unknown(cost::slab_share_returned(run, &cost.host).map(format::percent)),
        ));
    }
    let heading = ["memory returned, as a share of its growth", "share"];
    format!("## After the teardown\n\n{}", table(heading, &rows))
}

/// Links to the charts in the same directory.
pub(super) fn chart_section(charts: &[Chart]) -> String {
    let links: String =
        charts.iter().map(|chart| format!("\n![{}]({})\n", chart.title, chart.file_name)).collect();
    if links.is_empty() { links } else { format!("## Charts\n{links}") }
}

fn machine(run: &Run) -> String {
    let lines = &run.machine.0;
    let shown = lines.iter().take(MACHINE_LINES_MAX);
    let mut rows: Vec<_> = shown.map(|(key, value)| row(key, value.clone())).collect();
    let more = lines.len() - rows.len();
    rows.extend((more > 0).then(|| row("…", format!("{} lines more", format::count(more as u64)))));
    let mut commands: Vec<_> =
        run.clients.iter().map(|(name, client)| (name.as_str(), &client.head.argv)).collect();
    commands.extend(run.server.as_ref().map(|server| ("server", &server.head.argv)));
    let tables = run.clients.iter().map(|(name, client)| (name.as_str(), client.file_table));
    for (name, table) in tables.chain(run.server.iter().map(|server| ("server", server.file_table)))
    {
        rows.extend(table.map(|table| row(&format!("file table of {name}"), table.to_string())));
    }
    for (name, argv) in commands {
        if !argv.is_empty() {
            rows.push(row(&format!("{name} ran as"), argv.join(" ")));
        }
    }
    format!("## Machine and command\n\n{}", text_table(["", ""], &rows))
}

fn row(name: &str, value: String) -> [String; 2] {
    [name.to_owned(), value]
}

fn or_unknown(text: Option<String>) -> String {
    text.unwrap_or_else(|| "unknown".to_owned())
}

fn number_or_unknown(value: u64) -> String {
    or_unknown((value > 0).then(|| format::count(value)))
}
