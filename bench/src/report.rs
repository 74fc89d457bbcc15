//! The tables: medians over the rounds, and ratios to the floor.

use std::fmt::Write;

use crate::contest::{Phase, Result};
use crate::instructions::Instructions;
use crate::memory::Memory;
use crate::record::Record;
use crate::syscalls::Syscalls;

/// The contestant that the others are compared with.
const FLOOR: &str = "floor";

pub(crate) fn tables(record: &Record) -> String {
    let mut text = format!("# {}\n\n", record.command);
    for (key, value) in &record.machine {
        let _ = writeln!(text, "- {key}: {value}");
    }
    let names = names(&record.results);
    if !names.is_empty() {
        text += &cost_table(&record.results, &names, "ramp", "connection");
        text += &cost_table(&record.results, &names, "echo, all active", "message");
        text += &latency_table(&record.results, &names, "echo, all active");
        text += &cost_table(&record.results, &names, "echo, 1% active", "message");
        text += &latency_table(&record.results, &names, "echo, 1% active");
    }
    text += &syscall_table(&record.syscalls);
    text += &memory_table(&record.memory);
    text += &instruction_table(&record.instructions);
    text += &micro_tables(&record.micro);
    text
}

fn names(results: &[Result]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for result in results {
        if !names.contains(&result.contestant.as_str()) {
            names.push(&result.contestant);
        }
    }
    // The order is that of the first round.
    names.sort_by_key(|name| usize::from(*name != FLOOR));
    names
}

/// One figure per round; phases of one name within a round are averaged.
fn figures(
    results: &[Result],
    name: &str,
    phase: &str,
    figure: impl Fn(&Phase) -> f64,
) -> Vec<f64> {
    let mut of_name: Vec<_> = results.iter().filter(|result| result.contestant == name).collect();
    of_name.sort_by_key(|result| result.round);
    of_name
        .iter()
        .map(|result| {
            let phases = result.phases.iter().filter(|each| each.name == phase);
            let all: Vec<_> = phases.map(&figure).collect();
            all.iter().sum::<f64>() / all.len().max(1) as f64
        })
        .collect()
}

fn median(mut figures: Vec<f64>) -> f64 {
    if figures.is_empty() {
        return f64::NAN;
    }
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    if figures.len() % 2 == 1 {
        figures[middle]
    } else {
        f64::midpoint(figures[middle - 1], figures[middle])
    }
}

/// The median of the ratios within each round, with the minimum and the maximum. Ratios within a round are not affected
/// by a machine that becomes slower.
fn ratio(figures: &[f64], floor: &[f64]) -> String {
    let ratios: Vec<_> = figures.iter().zip(floor).map(|(each, floor)| each / floor).collect();
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{:.3} ({least:.2}-{greatest:.2})", median(ratios))
}

fn cost_table(results: &[Result], names: &[&str], phase: &str, what: &str) -> String {
    let mut text = format!(
        "\n## {phase}: per {what}\n\n\
         | | user ns | to the floor | system ns | to the floor | both, to the floor | {what}s/s | to the floor |\n\
         | --- | --: | --: | --: | --: | --: | --: | --: |\n"
    );
    let of = |name: &str, figure: &dyn Fn(&Phase) -> f64| figures(results, name, phase, figure);
    let both = |phase: &Phase| phase.user_ns_each() + phase.system_ns_each();
    for name in names {
        let columns: [&dyn Fn(&Phase) -> f64; 4] =
            [&Phase::user_ns_each, &Phase::system_ns_each, &both, &Phase::per_second];
        let [user, system, both, rate] = columns.map(|figure| {
            let mine = of(name, figure);
            (ratio(&mine, &of(FLOOR, figure)), median(mine))
        });
        let _ = writeln!(
            text,
            "| {name} | {:.0} | {} | {:.0} | {} | {} | {:.0} | {} |",
            user.1, user.0, system.1, system.0, both.0, rate.1, rate.0
        );
    }
    text
}

fn latency_table(results: &[Result], names: &[&str], phase: &str) -> String {
    let mut text = format!(
        "\n### {phase}: latency, ms\n\n| | p50 | p99 | p99.9 | max |\n| --- | --: | --: | --: | --: |\n"
    );
    for name in names {
        let of = |figure: fn(&crate::contest::Latency) -> f64| {
            median(figures(results, name, phase, |phase| {
                phase.latency_us.as_ref().map_or(f64::NAN, figure) / 1000.0
            }))
        };
        let (p50, p99) = (of(|latency| latency.p50), of(|latency| latency.p99));
        let (p999, max) = (of(|latency| latency.p999), of(|latency| latency.max));
        let _ = writeln!(text, "| {name} | {p50:.2} | {p99:.2} | {p999:.2} | {max:.2} |");
    }
    text
}

fn syscall_table(syscalls: &[Syscalls]) -> String {
    if syscalls.is_empty() {
        return String::new();
    }
    let mut text = "\n## System calls\n\n| | per accepted connection | of these | per message | of these |\n| --- | --: | --- | --: | --- |\n".to_owned();
    for each in syscalls {
        let (accepting, accept_calls) = calls(&each.accepting, each.connections);
        let (echoing, echo_calls) = calls(&each.echoing, each.messages);
        let _ = writeln!(
            text,
            "| {} | {accepting:.2} | {accept_calls} | {echoing:.2} | {echo_calls} |",
            each.contestant
        );
    }
    text
}

fn calls(by_name: &std::collections::BTreeMap<String, u64>, operations: usize) -> (f64, String) {
    let each = |calls: u64| calls as f64 / operations as f64;
    let mut sorted: Vec<_> = by_name.iter().filter(|&(_, &calls)| each(calls) >= 0.005).collect();
    sorted.sort_by_key(|&(_, &calls)| std::cmp::Reverse(calls));
    let list: Vec<_> =
        sorted.iter().map(|&(name, &calls)| format!("{name} {:.2}", each(calls))).collect();
    (each(by_name.values().sum()), list.join(", "))
}

fn memory_table(memory: &[Memory]) -> String {
    if memory.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "\n## Own memory at {} idle connections\n\n| | bytes per connection | in all, KiB |\n| --- | --: | --: |\n",
        memory[0].connections
    );
    for each in memory {
        let _ = writeln!(
            text,
            "| {} | {:.1} | {} |",
            each.contestant,
            each.bytes_per_connection,
            each.bytes / 1024
        );
    }
    text
}

fn instruction_table(instructions: &[Instructions]) -> String {
    if instructions.is_empty() {
        return String::new();
    }
    let mut text =
        "\n## Instructions in user space\n\n| | per accept | per message |\n| --- | --: | --: |\n"
            .to_owned();
    for each in instructions {
        let _ = writeln!(
            text,
            "| {} | {:.0} | {:.0} |",
            each.contestant, each.per_accept, each.per_message
        );
    }
    text
}

fn micro_tables(micro: &[crate::record::Micro]) -> String {
    let mut text = String::new();
    for (subject, unit) in [
        ("memory", "bytes per entry"),
        ("timers", "ns per operation"),
        ("slab", "ns per operation"),
    ] {
        let of_subject: Vec<_> = micro.iter().filter(|each| each.subject == subject).collect();
        let mut entries: Vec<_> = of_subject.iter().map(|each| each.entries).collect();
        entries.sort_unstable();
        entries.dedup();
        if entries.is_empty() {
            continue;
        }
        let _ = write!(text, "\n## {subject}: {unit}\n\n| | |");
        for entries in &entries {
            let _ = write!(text, " {entries} |");
        }
        text += "\n| --- | --- |";
        text += &" --: |".repeat(entries.len());
        text.push('\n');
        let mut rows: Vec<(&str, &str)> = Vec::new();
        for each in &of_subject {
            if !rows.contains(&(&each.operation, &each.structure)) {
                rows.push((&each.operation, &each.structure));
            }
        }
        rows.sort_by_key(|&(operation, _)| {
            of_subject.iter().position(|each| each.operation == operation)
        });
        for (operation, structure) in rows {
            let _ = write!(text, "| {operation} | {structure} |");
            for &entries in &entries {
                let of_row = of_subject.iter().filter(|each| {
                    (each.operation.as_str(), each.structure.as_str(), each.entries)
                        == (operation, structure, entries)
                });
                let _ = write!(text, " {:.1} |", median(of_row.map(|each| each.cost).collect()));
            }
            text.push('\n');
        }
    }
    text
}
