//! The page of a run: the verdict first, then the figures behind it.

use std::error::Error;
use std::fmt::Write;

use c1000k_host::format;
use c1000k_record::{ClientRecord, LatencyUs, Threshold};

use super::Export;
use crate::Report;
use crate::bottleneck::{self, Bottleneck, Evidence};
use crate::chart::Chart;
use crate::checks::{CONNECTIONS_TO_WEIGH_MIN, Check, PASSES_MAX};
use crate::compare::{Comparison, Noise, Row, Spread};
use crate::cost::{self, HostCost, float};
use crate::escape::markdown;
use crate::run::{Moment, Run, Topology, total};
use crate::table::{table, table_with_notes, text_table};
use crate::{trend, verdict};

/// Nor are more slab caches.
const SLABS_MAX: usize = 20;

/// More are not shown.
const THRESHOLDS_MAX: usize = 100;

/// `scripts/million` writes some ten.
const MACHINE_LINES_MAX: usize = 100;

/// The page, with links to the charts that lie beside it.
#[derive(Debug)]
pub(super) struct Markdown;

impl Export for Markdown {
    fn file_name(&self) -> &'static str {
        "summary.md"
    }

    fn report(&self, report: &Report) -> Result<String, Box<dyn Error>> {
        Ok(page(report))
    }

    fn comparison(&self, comparison: &Comparison) -> Result<String, Box<dyn Error>> {
        Ok(format!("{}\n{}\n", compared(comparison), noise_note(comparison)))
    }
}

/// The figures side by side. Where each side is one run, no noise can stand beside them.
fn compared(comparison: &Comparison) -> String {
    if comparison.is_of_single_runs() {
        let names = comparison.sides.each_ref().map(|side| side.name.as_str());
        let row = |row: &Row| {
            let [first, second] = row.values.map(|spread| median(row, spread));
            [row.name.to_owned(), first, second, ratio(row)]
        };
        let rows: Vec<_> = comparison.rows.iter().map(row).collect();
        return table(["", names[0], names[1], "ratio"], &rows);
    }
    compared_with_noise(comparison)
}

/// A comparison as a page: what both sides are, then their figures, and beside each what the difference is worth.
pub(super) fn comparison_page(comparison: &Comparison) -> String {
    let names = comparison.sides.each_ref().map(|side| side.name.as_str());
    let rows = comparison.sides.iter().flat_map(|side| &side.runs).map(|run| {
        let bottleneck = bottleneck::find(&Evidence::of(run));
        let verdict = verdict::headline(run);
        [run.folder.display().to_string(), verdict, bottleneck.kind.to_string()]
    });
    let rows: Vec<_> = rows.collect();
    format!(
        "# {} and {}\n\n{}\n\n## Figures\n\n{}\n## Runs\n\n{}",
        markdown(names[0]),
        markdown(names[1]),
        noise_note(comparison),
        compared_with_noise(comparison),
        text_table(["run", "verdict", "limited by"], &rows)
    )
}

/// The figures side by side, each with its spread, and what their difference is worth.
fn compared_with_noise(comparison: &Comparison) -> String {
    let names = comparison.sides.each_ref().map(|side| match side.runs.len() {
        1 => side.name.clone(),
        count => format!("{} ({count} runs)", side.name),
    });
    let row = |row: &Row| {
        let [first, second] = row.values.map(|spread| with_ends(row, spread));
        let noise = match row.noise() {
            Noise::Unknown => "unknown",
            Noise::Within => "within the noise",
            Noise::Beyond => "beyond the noise",
        };
        [row.name.to_owned(), first, second, ratio(row), noise.to_owned()]
    };
    let rows: Vec<_> = comparison.rows.iter().map(row).collect();
    table(["", &names[0], &names[1], "ratio", "difference"], &rows)
}

/// How the noise is known, or why it is not.
fn noise_note(comparison: &Comparison) -> &'static str {
    match comparison.sides.each_ref().map(|side| side.runs.len() > 1) {
        [true, true] => {
            "Each figure is the median, with the lowest and the highest in brackets. A difference is beyond the noise \
             where no value of one side lies among those of the other."
        }
        [false, false] => {
            "Each side is one run, so the noise is unknown: give two folders with several runs in each to see it."
        }
        _ => {
            "One side is a single run, so the noise is unknown: the brackets show the lowest and the highest of the \
             other."
        }
    }
}

fn ratio(row: &Row) -> String {
    row.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"))
}

fn median(row: &Row, spread: Option<Spread>) -> String {
    seen(spread.map(|spread| row.unit.text(spread.median)))
}

/// `26,239/s (25,747/s to 27,001/s)`.
fn with_ends(row: &Row, spread: Option<Spread>) -> String {
    let ends = spread.map(|spread| [spread.min, spread.max].map(|value| row.unit.text(value)));
    let ends = ends.filter(|[lowest, highest]| lowest != highest);
    let ends = ends.map_or_else(String::new, |ends| format!(" ({})", ends.join(" to ")));
    median(row, spread) + &ends
}

fn page(report: &Report) -> String {
    let Report { run, checks, evidence, bottleneck, charts } = report;
    let held = run.connections().map_or_else(|| "No".to_owned(), format::count);
    let topology = run.topology_known().map(|topology| format!(", {}", topology.name()));
    let topology = topology.unwrap_or_default();
    let sections = [
        format!("# {held} connections{topology}\n\n{}\n", paragraphs(run, checks)),
        setup(run),
        limited(bottleneck, evidence),
        chart_section(charts),
        figures(run),
        clients(run),
        workload_section(run),
        reopened_section(run),
        thresholds(run),
        cost_section(run),
        original(run),
        agreement(checks),
        rate_section(run),
        teardown(run),
        machine(run),
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

/// What was run against what and where, in a line.
fn setup(run: &Run) -> String {
    let mut parts = Vec::new();
    if let Some((_, client)) = run.clients.first() {
        let protocol = Some(client.protocol.as_str()).filter(|name| !name.is_empty());
        let target = format!("{} to {}", protocol.unwrap_or("connections"), client.destination);
        let clients = match run.clients.len() {
            1 => String::new(),
            count => format!(", {}", format::counted(count as u64, "client")),
        };
        let ports = format::counted(client.ports, "port");
        parts.push(format!("{target}, {ports}{clients}"));
    }
    if let Some(server) = run.server.as_ref().filter(|server| server.threads > 0) {
        parts.push(format!("server with {}", format::counted(server.threads, "thread")));
    }
    let mut processors = run.clients.iter().filter_map(|(_, client)| client.processors);
    let server = run.server.as_ref().and_then(|server| server.processors);
    let processors = server.or_else(|| processors.next());
    parts.extend(processors.map(|count| format::counted(count, "processor")));
    parts.extend(run.machine.value("kernel").map(|kernel| format!("kernel {kernel}")));
    let mut begun = run.clients.iter().map(|(_, client)| client.head.started_at.as_str());
    parts.extend(begun.next().filter(|at| !at.is_empty()).map(str::to_owned));
    if parts.is_empty() {
        return String::new();
    }
    format!("Setup: {}.\n", markdown(&parts.join("; ")))
}

/// What limited the run, and the figures that show it.
fn limited(bottleneck: &Bottleneck, evidence: &Evidence) -> String {
    let of_all = |share: f64, count: Option<u64>| {
        format!(
            "{} of {}",
            format::percent(share),
            format::counted(count.unwrap_or(0), "processor")
        )
    };
    let mut rows = Vec::new();
    for share in evidence.clients.iter().chain(&evidence.server_cpu) {
        let busy = bottleneck::of_processors(share.process, share.threads);
        rows.push(row(&format!("processor time of {}, ramp", share.name), busy));
    }
    // One machine has the same figures in each record.
    let machines = if evidence.is_one_machine { 1 } else { usize::MAX };
    let shares = evidence.clients.iter().chain(&evidence.server_cpu);
    for share in shares.filter(|share| share.machine_shares().is_some()).take(machines) {
        let Some((busy, softirq)) = share.machine_shares() else { continue };
        let name = if evidence.is_one_machine { "both" } else { &share.name };
        rows.push(row(&format!("machine of {name}, busy"), of_all(busy, share.processors)));
        rows.extend(softirq.map(|softirq| {
            row(&format!("machine of {name}, soft interrupts"), of_all(softirq, share.processors))
        }));
    }
    let counters = [
        ("connects that met a full queue of a listener", evidence.queue_drops),
        ("SYNs retransmitted", evidence.syn_retransmits),
    ];
    rows.extend(counters.map(|(name, count)| row(name, seen(count.map(format::count)))));
    format!(
        "## What limited the run\n\n**{}.** {}\n\n{}",
        bottleneck.kind,
        markdown(&bottleneck.evidence),
        table(["", "found"], &rows)
    )
}

fn figures(run: &Run) -> String {
    let count = |figure: fn(&ClientRecord) -> u64| seen(run.sum(figure).map(format::count));
    let mut rows = vec![
        row("asked for", count(|client| client.target)),
        row("held at once", seen(run.connections().map(format::count))),
        row("attempted", count(|client| client.attempted)),
        row("retried", count(|client| client.retried)),
    ];
    if run.clients.iter().all(|(_, client)| !client.verified_passes.is_empty()) {
        rows.extend(passes(run));
    } else {
        rows.push(row("verified by echo", seen(run.verified().map(format::count))));
        rows.push(row("not verified, as asked", format::count(run.unverified())));
    }
    rows.push(row("failed", count(|client| client.failed)));
    rows.push(row("lost", count(|client| client.lost)));
    if let Some(server) = &run.server {
        rows.extend([
            row("accepted by the server", format::count(server.accepted)),
            row("refused by the server", format::count(server.refused)),
            row("stale events, dropped", format::count(server.stale_events)),
            row("reactor threads of the server", seen_number(server.threads)),
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
    format!("## What was asked and held\n\n{}", table(["", "count"], &rows))
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
            let time = |us: Option<u64>| seen(us.map(|us| format::duration(float(us) / 1e6)));
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

/// Latencies are counted from the time a message was due.
fn workload_section(run: &Run) -> String {
    let of = |(name, client): &(String, ClientRecord)| {
        let workload = client.workload.as_ref()?;
        let latency = workload.latency_us;
        let time = |us: Option<u64>| seen(us.map(|us| format::duration(float(us) / 1e6)));
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
         whether it could be sent then or not.\n\n{}\n{}",
        table(heading, &rows),
        table(fault_heading, &fault_rows)
    )
}

/// Churn and storms.
fn reopened_section(run: &Run) -> String {
    let row = |name: &str, what: &str, counts: [u64; 2], seconds: f64, latency: LatencyUs| {
        let time = |us: Option<u64>| seen(us.map(|us| format::duration(float(us) / 1e6)));
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
    format!("## Closed and opened anew\n\n{}", table(heading, &rows))
}

fn thresholds(run: &Run) -> String {
    let of = |(name, client): &(String, ClientRecord)| -> Vec<[String; 4]> {
        let row = |threshold: &Threshold| {
            let value = threshold.value.map(|value| format::count(format::rounded(value)));
            let outcome = if threshold.passed { "pass" } else { "FAIL" };
            [name.clone(), threshold.expression.clone(), seen(value), outcome.to_owned()]
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
    let _ = writeln!(
        text,
        "The server's process: {} a connection; resident {} before, {} at the peak.\n",
        seen(memory.bytes_each.map(format::bytes_each)),
        seen(memory.before_bytes.map(format::bytes)),
        seen(memory.peak_bytes.map(format::bytes))
    );
    let kernels = cost::kernels(run);
    if kernels.is_empty() {
        text.push_str(&kernel_reported(run));
    }
    if kernels.iter().any(|cost| !cost.caches.is_empty()) {
        text.push_str(
            "A kernel merges caches whose objects have one size, and shows them under the name of \
             one of them.\n\n",
        );
    }
    let mut blocks: Vec<String> = kernels.iter().map(kernel_cost).collect();
    let layers = layers(run);
    if !layers.is_empty() {
        // What stands above is a paragraph where no kernel has its table.
        text.push_str(if blocks.is_empty() { "\n" } else { "" });
        blocks.push(layers);
    }
    text + &blocks.join("\n")
}

/// The state of one connection by layer; nothing where no client says what it keeps.
fn layers(run: &Run) -> String {
    let mut rows = Vec::new();
    for (name, client) in &run.clients {
        let Some(state) = client.state_bytes else { continue };
        let mut part = |layer: &str, bytes: u64, note: &str| {
            let bytes = format!("{} B", format::count(bytes));
            rows.push([format!("{name}, {layer}"), bytes, note.to_owned()]);
        };
        part("ours", state.ours, "the reactor's slot and what the run keeps, by their sizes");
        part("protocol", state.protocol, &format!("{}, by its size", client.protocol));
        if state.tls > 0 {
            part("TLS", state.tls, "the session, by its size; its keys and buffers come on top");
        }
        let is_weighed = client.established >= CONNECTIONS_TO_WEIGH_MIN;
        let grown = client.process_bytes_per_connection.filter(|_| is_weighed);
        rows.extend(grown.map(|bytes| {
            let note = "growth during the ramp, with buffers and histograms";
            [format!("{name}, whole process"), format::bytes_each(bytes), note.to_owned()]
        }));
    }
    if rows.is_empty() {
        return String::new();
    }
    let own = cost::process(run).bytes_each.map(|bytes| {
        let note = "growth until the peak";
        ["server, whole process".to_owned(), format::bytes_each(bytes), note.to_owned()]
    });
    rows.extend(own);
    let kernel =
        cost::server_end_bytes(run).or_else(|| run.server.as_ref()?.kernel_bytes_per_connection);
    rows.extend(kernel.map(|bytes| {
        let note = "slab caches of one end";
        ["kernel, one end".to_owned(), format::bytes_each(bytes), note.to_owned()]
    }));
    rows.extend(slabs_reported(run));
    format!(
        "The state of a connection by layer:\n\n{}",
        table_with_notes(["layer", "a connection", "what it is"], &rows)
    )
}

/// By slab cache, as the server measured them; nothing where the snapshots have them.
fn slabs_reported(run: &Run) -> Vec<[String; 3]> {
    let Some(server) = &run.server else { return Vec::new() };
    let has_snapshots = !cost::kernels(run).is_empty();
    if has_snapshots || server.peak < CONNECTIONS_TO_WEIGH_MIN {
        return Vec::new();
    }
    let ends = float(server.peak) * float(run.ends_in_kernel());
    let mut slabs: Vec<_> = server.kernel_bytes_by_slab.iter().flatten().collect();
    slabs.sort_by_key(|(_, bytes)| std::cmp::Reverse(**bytes));
    let row = |(name, bytes): &(&String, &u64)| {
        let note = if *name == "other" { "growth of all other slabs" } else { "slab cache" };
        let each = format::bytes_each(float(**bytes) / ends);
        [format!("kernel, {name}"), each, note.to_owned()]
    };
    slabs.iter().take(SLABS_MAX).map(row).collect()
}

/// What the server reports itself, where there are no snapshots.
fn kernel_reported(run: &Run) -> String {
    let reported = run.server.as_ref().and_then(|server| server.kernel_bytes_per_connection);
    let found = seen(reported.map(|bytes| {
        format!("{} for one end of a connection, by the server", format::bytes_each(bytes))
    }));
    format!("The kernel: {found}; the slabs of the host are not in the snapshots.\n")
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
    rows.push(last("together", cost.bytes()));
    let mut text = format!(
        "The {}, by slab cache, pages included ({} connections):\n\n{}",
        markdown(&cost.name()),
        format::count(cost.connections),
        table(["cache", "objects", "size of one", "a connection"], &rows)
    );
    if cost.ends == 2 {
        let _ = writeln!(text, "\nThat is {} an end.", format::bytes_each(cost.bytes() / 2.0));
    }
    let _ = writeln!(
        text,
        "\nOther processes move slabs too. By the caches that connections live in, of those shared \
         with all files one object each, an end takes {}.",
        format::bytes_each(cost.end_bytes)
    );
    text
}

/// The test that this software repeats, beside its own figures, where the hosts are the same.
fn original(run: &Run) -> String {
    if run.topology() != Topology::ThreeHosts || run.is_one_kernel() {
        return String::new();
    }
    let memory = |host: &str| {
        let at = |moment| run.snapshot(host, moment).and_then(|seen| seen.memory_used_bytes);
        seen(at(Moment::Peak).map(format::bytes))
    };
    let connections = seen(run.connections().map(format::count));
    let rows = [
        ["kernel", "4.4", run.machine.value("kernel").unwrap_or("not seen")].map(str::to_owned),
        ["connections held".into(), "1,000,000".into(), connections],
        ["memory in use, server".into(), "2.6 GB".into(), memory("server")],
        ["memory in use, client 1".into(), "1.2 GB".into(), memory("client-1")],
        ["memory in use, client 2".into(), "1.2 GB".into(), memory("client-2")],
        ["the end".into(), "server killed for want of memory at 1,150,000 (6 GB)".into(), end(run)],
    ];
    format!(
        "## Beside the original test\n\n{}\nMemory in use is the whole host's: what is neither \
         free nor cache.\n",
        table(["", "original", "this run"], &rows)
    )
}

fn end(run: &Run) -> String {
    match (&run.server, run.snapshot("server", Moment::After)) {
        (Some(_), Some(_)) => "server outlived the teardown".to_owned(),
        (Some(_), None) => "server wrote its record".to_owned(),
        (None, _) => "not seen".to_owned(),
    }
}

fn agreement(checks: &[Check]) -> String {
    let rows: Vec<_> = checks
        .iter()
        .map(|check| {
            let Check { name, expected, found, outcome, note, .. } = check;
            [name.clone(), expected.clone(), found.clone(), outcome.to_string(), note.clone()]
        })
        .collect();
    let heading = ["check", "expected", "found", "agrees", "what it means"];
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
        "the server's process",
        seen(cost::process(run).share_returned().map(format::percent)),
    )];
    for cost in cost::kernels(run) {
        rows.push(row(
            &format!("slabs that connections have to themselves, host {}", cost.host),
            seen(cost::slab_share_returned(run, &cost.host).map(format::percent)),
        ));
    }
    let heading = ["memory that came back, of what was grown", "share"];
    let memory = cost::process(run);
    let resident = [memory.before_bytes, memory.peak_bytes, memory.after_bytes];
    let [before, peak, after] = resident.map(|bytes| seen(bytes.map(format::bytes)));
    format!(
        "## After the teardown\n\n{}\nResident memory of the server's process: {before} before, {peak} at the peak, \
         {after} after the drain.\n",
        table(heading, &rows)
    )
}

fn chart_section(charts: &[Chart]) -> String {
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

fn seen(text: Option<String>) -> String {
    text.unwrap_or_else(|| "not seen".to_owned())
}

fn seen_number(value: u64) -> String {
    seen((value > 0).then(|| format::count(value)))
}
