//! Runs synthetic recordings through the whole report.

use std::fs;

use clap::{Args, FromArgMatches};

use crate::compare::{Comparison, Metric, Pair, Verdict};
use crate::record::{
    Ceiling, Environment, Latency, Machine, MapTime, Plan, Recording, Run, Throughput, Trial,
};
use crate::report::{MARGIN, Report, ReportArgs, report_to};
use crate::run::{enough, schedule};
use crate::stats::Random;

/// Returns numbers in `-1.0..1.0` that look random and are the same every time.
fn jitter(seed: &mut u64) -> f64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as f64 / f64::from(1u32 << 30) - 1.0
}

fn speed(mode: &str) -> f64 {
    match mode {
        "cdev" => 1.03,
        "noiommu" => 1.08,
        _ => 1.0,
    }
}

fn run(nic: &str, mode: &str, pair: &str, round: u32, seed: &mut u64) -> Run {
    let base = match nic {
        "virtio-net" => 612e3,
        "e1000" => 154e3,
        _ => 208e3,
    };
    let mut about = |x: f64, share: f64| x * (1.0 + share * jitter(seed));
    let p50 = about(4.1e10 / base / speed(mode), 0.02) as u64;
    let iommu = !mode.starts_with("noiommu");
    let (cdev, sent) = (mode.ends_with("cdev"), about(200e3, 0.1) as u64);
    let lost = if round == 3 && nic == "e1000" { 17 } else { 0 };
    let open_ms = about(if cdev { 103.0 } else { 108.0 }, 0.03);
    let map_ms = if iommu { about(2.9, 0.05) } else { 0.0 };
    Run {
        nic: nic.into(),
        mode: mode.into(),
        round,
        pair: pair.into(),
        forward_pps: about(base * speed(mode), 0.008),
        throughput: [(60, 1.1), (1514, 0.9)]
            .map(|(frame, times)| Throughput {
                frame,
                pps: about(base * speed(mode) * times, 0.02),
                // Above what the generator can send.
                at_least: nic == "virtio-net" && frame == 1514,
                trials: Vec::new(),
            })
            .into(),
        latency_ns: Latency {
            p50,
            p99: about(p50 as f64 * 1.9, 0.05) as u64,
            p999: about(p50 as f64 * 4.2, 0.15) as u64,
            max: about(p50 as f64 * 30.0, 0.4) as u64,
            count: sent - lost,
        },
        latency_counts: vec![(p50, (sent - lost) * 6 / 10), (p50 * 2, sent - lost - (sent - lost) * 6 / 10)],
        open_ms,
        bind_ms: if cdev { about(0.21, 0.1) } else { 0.0 },
        attach_ms: if iommu { about(if cdev { 0.34 } else { 1.9 }, 0.05) } else { 0.0 },
        start_map_ms: map_ms / 4.0,
        first_packet_ms: open_ms + map_ms / 4.0 + about(14.0, 0.1),
        sent,
        received: sent - lost,
        doorbells: (sent - lost) / 4,
        counters: [("instructions".to_owned(), (sent - lost) * 30)].into(),
        counted_packets: (sent - lost) / 2,
        drops: [("rx_missed".to_owned(), lost), ("tx_full".to_owned(), 0)].into(),
        machine: None,
    }
}

/// Returns a recording of one boot: every NIC in every mode, in every round, and one mode twice.
fn recording(modes: &[&str], rounds: u32) -> Recording {
    let mut seed = modes.len() as u64;
    let (mut runs, mut maps) = (Vec::new(), Vec::new());
    for nic in ["virtio-net", "e1000", "e1000e"] {
        for round in 0..rounds {
            for (pair, mode) in schedule(modes, round, &mut Random(seed)) {
                runs.push(run(nic, mode, pair, round, &mut seed));
            }
        }
    }
    for mode in modes.iter().filter(|mode| !mode.starts_with("noiommu")) {
        for (memory, cost) in [("4 KiB", 17.5), ("2 MiB", 1.7)] {
            for call in ["map", "map-file"].iter().filter(|c| **c == "map" || *mode == "cdev") {
                for round in 0..rounds {
                    let file = if *call == "map" { 1.0 } else { 0.6 };
                    let map_ms = cost * file * (1.0 + 0.08 * jitter(&mut seed));
                    let (memory, call) = (memory.to_owned(), (*call).to_owned());
                    let mode = (*mode).to_owned();
                    let (bytes, unmap_ms) = (1 << 30, map_ms * 1.4);
                    maps.push(MapTime {
                        mode,
                        memory,
                        call,
                        bytes,
                        round,
                        map_ms,
                        map_ioctl_ms: map_ms / 1.001,
                        unmap_ms,
                        map_ioctls: 1,
                        unmap_ioctls: 1,
                    });
                }
            }
        }
    }
    let facts = [
        ("vireo", "0.1.0 (5c1f0e2)"),
        ("date", "2026-11-24T10:12:44Z"),
        ("kernel", "6.12.57+deb13-amd64"),
        ("cpu", "AMD EPYC 7B13"),
        ("cpus", "2"),
        ("accelerator", "KVM (QEMU 7.2.22)"),
        ("hugepages", "512 × 2 MiB"),
        ("iommu", if modes[0].starts_with("noiommu") { "none" } else { "Intel VT-d (QEMU), caching mode" }),
        ("command", "./scripts/lab compare --yes --json compare.json --html <compare>.html"),
    ];
    let environment = Environment(facts.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    let ceiling = |nic: &str| Ceiling { nic: nic.to_owned(), round: 0, pps: 2e6 };
    let ceilings = ["virtio-net", "e1000", "e1000e"].map(ceiling).to_vec();
    let plan = Plan {
        modes: modes.iter().map(|mode| (*mode).to_owned()).collect(),
        seed: 1,
        rounds,
        width: 0.05,
        limit: 300.0,
        stream: 0.2,
        map_mib: 1024,
        loss: 0.001,
        frames: vec![60, 1514],
        ..Plan::default()
    };
    let end = Some(format!("after {rounds} rounds"));
    Recording { environment, plan: Some(plan), runs, maps, ceilings, end }
}

fn boots() -> Vec<Recording> {
    vec![recording(&["container", "cdev", "compat"], 16), recording(&["noiommu", "noiommu-cdev"], 16)]
}

fn compare(boots: &[Recording]) -> Comparison {
    Comparison::of(boots, MARGIN)
}

fn as_report(boots: Vec<Recording>) -> Report {
    Report::of(boots, Vec::new(), MARGIN, &[])
}

fn pair<'a>(comparison: &'a Comparison, subject: &str, modes: [&str; 2], metric: Metric) -> &'a Pair {
    let fits = |p: &&Pair| p.subject == subject && [&*p.baseline, &*p.mode] == modes && p.metric == metric;
    comparison.pairs.iter().find(fits).unwrap()
}

#[test]
fn the_ceiling_is_beside_what_was_forwarded() {
    let comparison = compare(&boots());
    let of: Vec<_> = comparison.null_forwarder.iter().map(|row| (row.nic.as_str(), row.boot)).collect();
    let nics = ["virtio-net", "e1000", "e1000e"];
    assert_eq!(of, nics.map(|nic| [(nic, 1), (nic, 2)]).concat());
    let said = crate::table::text(&as_report(boots()), false);
    assert!(said.contains("Null forwarder"), "{said}");
    assert!(said.contains(" 1.0010 "), "{said}");
}

#[test]
fn rows_hold_medians_and_sums_in_the_order_of_the_tables() {
    let boots = boots();
    let comparison = compare(&boots);
    let names: Vec<_> = comparison.rows.iter().map(|r| (&*r.nic, &*r.label)).collect();
    assert_eq!(
        names[..5],
        ["container", "cdev", "compat", "noiommu", "noiommu-cdev"].map(|m| ("virtio-net", m))
    );
    assert_eq!((names.len(), names[5], names[10]), (15, ("e1000", "container"), ("e1000e", "container")));
    let of_row = |r: &&Run| r.nic == "e1000" && r.mode == "container" && r.pair != Run::TWIN;
    let sent: u64 = boots[0].runs.iter().filter(of_row).map(|r| r.sent).sum();
    let row = &comparison.rows[5];
    assert_eq!((row.sent, row.dropped, row.received, row.rounds), (sent, 17, sent - 17, 16));
    assert_eq!(row.drops["rx_missed"], 17);
    assert!((row.forward_pps / 154e3 - 1.0).abs() < 0.01 && row.balanced, "{row:?}");
    assert_eq!((row.latency_ns.count, comparison.rows[3].start_map_ms), (row.received, 0.0));
    let slowest = boots[0].runs.iter().filter(of_row).map(|r| 2 * r.latency_ns.p50).max().unwrap();
    assert!(row.latency_ns.max >= slowest && row.latency_ns.p999 <= row.latency_ns.max, "{row:?}");
    assert!(comparison.problems.is_empty());
}

#[test]
fn a_difference_is_said_and_quantified_and_so_is_what_is_possible_without_one() {
    let comparison = compare(&boots());
    // Throughput has two frame sizes on three NICs. The generator cannot keep up with one of these six.
    assert_eq!(comparison.family.comparisons, (3 * 5 + 5) * (3 + 1) + 2 * 2 * 3);
    let p = pair(&comparison, "virtio-net", ["container", "cdev"], Metric::ForwardPps);
    let interval = p.interval.unwrap();
    assert_eq!((p.verdict, p.rounds), (Verdict::Differs, 16));
    assert!(interval.low > 1.015 && interval.high < 1.045, "{p:?}");
    assert!(
        p.sentence.starts_with("virtio-net: cdev's forwarding rate is 103 % of container's (10"),
        "{}",
        p.sentence
    );
    let attach = pair(&comparison, "e1000", ["cdev", "compat"], Metric::Attach);
    assert!(
        attach.sentence.starts_with("e1000: compat's time to open, bind and attach is 107 % of cdev's (10"),
        "{}",
        attach.sentence
    );
    let same = pair(&comparison, "e1000e", ["container", "compat"], Metric::ForwardPps);
    assert_eq!(same.verdict, Verdict::Equivalent);
    let changes = crate::words::changes(same.interval.unwrap());
    assert_eq!(
        same.sentence,
        format!("e1000e: forwarding rate of container and compat is the same within ±5 % ({changes})")
    );
    let map = pair(&comparison, "4 KiB pages, map", ["container", "cdev"], Metric::Map);
    assert_eq!((map.verdict, map.rounds), (Verdict::Undecided, 16), "{map:?}");
}

/// Returns the verdict on two modes, the second faster by `gain`, in rounds that all agree. Each twin is
/// faster than its mode by `own`.
fn exact(gain: f64, own: f64, rounds: u32) -> Verdict {
    let mut boot = recording(&["container", "cdev"], rounds);
    boot.runs.retain(|r| r.nic == "e1000");
    for run in &mut boot.runs {
        let cdev = if run.mode == "cdev" { 1.0 + gain } else { 1.0 };
        let twin = if run.pair == Run::TWIN { 1.0 + own } else { 1.0 };
        run.forward_pps = 1e5 * cdev * twin;
    }
    let comparison = compare(&[boot]);
    pair(&comparison, "e1000", ["container", "cdev"], Metric::ForwardPps).verdict
}

#[test]
fn a_verdict_takes_rounds_enough_and_a_mode_that_does_not_differ_from_itself() {
    assert_eq!(exact(0.02, 0.0, 12), Verdict::Differs);
    assert_eq!(exact(-0.02, 0.0, 12), Verdict::Differs);
    assert_eq!(exact(0.0, 0.0, 12), Verdict::Equivalent);
    // 11 comparisons at 5 % need 9 rounds.
    assert_eq!(exact(0.02, 0.0, 9), Verdict::Differs);
    assert_eq!(exact(0.02, 0.0, 8), Verdict::TooFewRounds);
    assert_eq!(exact(0.02, 0.01, 12), Verdict::NotComparable);
}

#[test]
fn a_throughput_beyond_the_generator_is_a_lower_bound_and_never_compared() {
    let comparison = compare(&boots());
    let p = pair(&comparison, "virtio-net with 1514-byte frames", ["container", "cdev"], Metric::Throughput);
    assert_eq!((p.verdict, p.interval.is_none()), (Verdict::Censored, true));
    assert!(p.sentence.ends_with(
        "is not judged: in some round the generator could not send more, or every load lost too much"
    ));
    let p = pair(&comparison, "virtio-net with 60-byte frames", ["container", "cdev"], Metric::Throughput);
    assert_eq!((p.verdict, p.rounds), (Verdict::Differs, 16));
    assert!(comparison.widest().unwrap().is_finite());
    assert!(!comparison.self_checks.iter().any(|check| check.subject.starts_with("virtio-net with 1514")));
    // One such round is enough: comparing only the others would favor the mode.
    let mut boot = recording(&["container", "cdev"], 12);
    let found = boot.runs.iter_mut().find(|run| run.nic == "e1000" && run.pair == Run::COMPARED).unwrap();
    found.throughput[0].at_least = true;
    let comparison = compare(&[boot]);
    let p = pair(&comparison, "e1000 with 60-byte frames", ["container", "cdev"], Metric::Throughput);
    assert_eq!(p.verdict, Verdict::Censored);
    let text = crate::table::text(&as_report(boots()), false);
    let line = |mode: &str| {
        let after = text.split("Throughput (").nth(1).unwrap();
        after.lines().find(|line| line.contains(mode) && line.contains("1514 B")).unwrap().to_owned()
    };
    assert!(line("container").contains("≥ ") && line("container").ends_with("0.1 %"), "{text}");
}

#[test]
fn what_a_trial_loses_between_the_nics_is_listed_and_nothing_more_is_allowed() {
    let mut boot = recording(&["container"], 1);
    boot.runs.retain(|run| run.nic == "e1000e" && run.pair == Run::COMPARED);
    let run = &mut boot.runs[0];
    run.throughput[0].trials.push(Trial { load: 1e5, pps: 1e5, sent: 100, received: 90 });
    run.sent += 10;
    assert_eq!(compare(std::slice::from_ref(&boot)).problems, Vec::<String>::new());
    let text = crate::table::text(&as_report(vec![boot.clone()]), false);
    assert!(text.contains("e1000e, container: 10 not counted"), "{text}");
    boot.runs[0].sent += 1;
    assert!(compare(&[boot]).problems[0].ends_with(": 11 unaccounted for"));
}

#[test]
fn a_forwarder_as_fast_as_the_generator_is_said() {
    let mut boot = recording(&["container", "cdev"], 2);
    assert!(compare(std::slice::from_ref(&boot)).generator_limits.is_empty());
    boot.ceilings[1].pps = 160e3;
    let comparison = compare(std::slice::from_ref(&boot));
    assert_eq!(comparison.generator_limits.len(), 1);
    let said = crate::table::text(&as_report(vec![boot]), false);
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        said.contains("! e1000: the rate of container and cdev is at least 90 % of what the sender"),
        "{said}"
    );
}

/// Like [`boots`], with two references in the first boot. One of them loses packets that nothing counts.
fn boots_with_references() -> Vec<Recording> {
    let (mut boots, mut seed) = (boots(), 7);
    let modes = std::mem::take(&mut boots[0].runs);
    for at in 0..modes.len() {
        let Run { nic, round, .. } = &modes[at];
        if at == 0 || modes[at - 1].round != *round {
            for (name, uncounted) in [("testpmd", 0), ("bridge", 5)] {
                let run = run(nic, name, Run::REFERENCE, *round, &mut seed);
                boots[0].runs.push(Run { sent: run.sent + uncounted, first_packet_ms: 0.0, ..run });
            }
        }
        boots[0].runs.push(modes[at].clone());
    }
    boots
}

#[test]
fn references_are_shown_and_change_nothing_that_is_said_of_modes() {
    let (without, with) = (boots(), boots_with_references());
    let comparison = compare(&with);
    let rest = |comparison: &Comparison| {
        let mut value = serde_json::to_value(comparison).unwrap();
        assert!(value.as_object_mut().unwrap().remove("references").is_some());
        value
    };
    assert_eq!(rest(&compare(&without)), rest(&comparison));
    assert_eq!(crate::findings::headlines(&compare(&without)), crate::findings::headlines(&comparison));
    assert_eq!(enough(&without[0], 16, 10.0), enough(&with[0], 16, 10.0));
    let of_nic = |nic: &str| comparison.references.iter().filter(|row| row.nic == nic).count();
    assert_eq!(["virtio-net", "e1000", "e1000e"].map(of_nic), [2, 2, 2]);
    let order: Vec<_> = comparison.forwarders().iter().map(|row| row.mode.clone()).collect();
    assert_eq!(order[3..8], ["noiommu", "noiommu-cdev", "bridge", "testpmd", "container"]);

    let report = as_report(with);
    let text = crate::table::text(&report, false);
    let table = |title: &str| text.split(title).nth(1).unwrap().split("\n\n").next().unwrap().to_owned();
    for (title, shown) in [("Forwarding and latency", true), ("Throughput (", true), ("Start-up", false)] {
        assert_eq!(table(title).contains("testpmd"), shown, "{title}");
    }
    let said = table("References").split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(said.contains("e1000, bridge: ") && said.contains("does not count all"), "{said}");
    assert!(!text.contains("PACKET COUNTS DO NOT ADD UP") && text.contains("bridge *"), "{text}");
    let page = crate::html::page(&report).unwrap();
    assert!(
        page.contains("80 not counted")
            && !page.contains("bad\"><td class=\"name\"></td><td class=\"name\">linux")
    );
}

#[test]
fn what_is_undecided_says_what_is_possible() {
    let mut boot = recording(&["container", "cdev"], 12);
    for run in boot.runs.iter_mut().filter(|run| run.mode == "cdev" && run.round % 2 == 0) {
        run.first_packet_ms *= 1.5;
    }
    let comparison = compare(&[boot]);
    let p = pair(&comparison, "e1000", ["container", "cdev"], Metric::FirstPacket);
    assert_eq!(p.verdict, Verdict::Undecided);
    assert!(
        p.sentence.contains("is undecided (") && p.sentence.ends_with(" % is possible)"),
        "{}",
        p.sentence
    );
    assert!(comparison.widest().unwrap() > 0.1, "{:?}", comparison.widest());
}

#[test]
fn a_disturbed_machine_is_said() {
    let mut boot = recording(&["container", "cdev"], 12);
    for (at, run) in boot.runs.iter_mut().enumerate() {
        let speed = if at == 5 { 400.0 } else { 1000.0 };
        run.machine =
            Some(Machine { speed, steal_ms: if at == 7 { 20.0 } else { 0.0 }, ..Machine::default() });
    }
    let report = as_report(vec![boot]);
    let expected = [
        "boot 1: the CPU ran at less than 80 % of its best speed (down to 40 %) in 1 of 108 runs",
        "boot 1: a hypervisor gave the CPUs to other guests in 1 of 108 runs",
    ];
    assert_eq!(report.timed.disturbances, expected);
    assert!(crate::table::text(&report, false).contains("THE MACHINE WAS DISTURBED\n  ! boot 1: the CPU"));
}

#[test]
fn modes_of_different_boots_get_no_verdict() {
    let comparison = compare(&boots());
    let p = pair(&comparison, "e1000", ["container", "noiommu"], Metric::ForwardPps);
    assert_eq!((p.verdict, p.rounds, p.interval, p.boots), (Verdict::NotInterleaved, 0, None, [1, 2]));
    assert!(
        p.sentence.contains("in another boot than container, so this is not a verdict"),
        "{}",
        p.sentence
    );
    let said = crate::table::text(&as_report(boots()), false);
    assert!(said.contains("noiommu ran in another boot, so this is not a verdict"), "{said}");
}

#[test]
fn a_mode_that_ran_in_two_boots_is_told_apart_and_compared_within_each() {
    let comparison = compare(&[recording(&["container", "cdev"], 8), recording(&["cdev", "compat"], 8)]);
    let labels: Vec<_> = comparison.rows[..4].iter().map(|r| &*r.label).collect();
    assert_eq!(labels, ["container", "cdev (boot 1)", "cdev (boot 2)", "compat"]);
    let modes: Vec<_> = (comparison.pairs.iter())
        .filter(|p| p.subject == "e1000" && p.metric == Metric::ForwardPps)
        .map(|p| (&*p.baseline, &*p.mode, p.verdict == Verdict::NotInterleaved))
        .collect();
    let expected = [
        ("container", "cdev (boot 1)", false),
        ("container", "compat", true),
        ("cdev (boot 2)", "compat", false),
    ];
    assert_eq!(modes, expected);
}

#[test]
fn unequal_sums_are_marked_said_and_fail_the_command() {
    let mut boot = recording(&["container", "cdev"], 6);
    boot.runs[0].received -= 3;
    let (nic, mode) = (boot.runs[0].nic.clone(), boot.runs[0].mode.clone());
    let report_of = as_report(vec![boot.clone()]);
    let comparison = &report_of.timed;
    let sound = comparison.rows.iter().filter(|row| row.balanced).count();
    assert_eq!(sound, comparison.rows.len() - 1);
    assert_eq!(comparison.problems.len(), 1);
    assert!(comparison.problems[0].ends_with(": 3 unaccounted for"), "{:?}", comparison.problems);
    let said = crate::table::text(&report_of, false);
    assert!(said.contains(&format!("{mode} !")) && said.contains("PACKET COUNTS DO NOT ADD UP"), "{said}");
    assert!(crate::html::page(&report_of).unwrap().contains(" bad\""));

    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.json");
    fs::write(&input, serde_json::to_string(&boot).unwrap()).unwrap();
    let error = report(&[input.to_str().unwrap()]).unwrap_err();
    assert_eq!(error.kind(), vireo_eal::ErrorKind::Protocol);
    assert!(
        error.to_string().starts_with(&format!("packet counts do not add up in 1 run(s): {nic}, {mode}")),
        "{error}"
    );
    boot.runs[0].received += 3;
    boot.runs[1].drops.insert("invented".into(), 1);
    assert!(compare(&[boot]).problems[0].ends_with(": 1 too many"));
}

#[test]
fn every_line_fits_and_no_cell_is_lost() {
    let report = as_report(boots());
    for lines in [false, true] {
        let said = crate::table::text(&report, lines);
        assert!(said.lines().all(|line| line.chars().count() <= 100), "{said}");
        assert!(!said.contains('\u{1b}') && said.contains('─') == lines, "{said}");
        for word in ["kpps", "p99.9", "noiommu-cdev", "map-file", "rx_missed 17", "6.12.57"] {
            assert!(said.contains(word), "{word} in {said}");
        }
    }
}

#[test]
fn the_page_is_whole_and_needs_nothing_else() {
    let report = as_report(boots());
    let page = crate::html::page(&report).unwrap();
    for tag in [
        "html", "head", "body", "main", "style", "table", "tr", "td", "th", "svg", "figure", "p", "pre", "dl",
    ] {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    for row in &report.timed.rows {
        assert!(page.contains(&format!("<td>{}</td>", crate::words::thousands(row.sent))), "{row:?}");
    }
    assert_eq!(page.matches("<svg ").count(), 7);
    assert!(page.contains("--html &lt;compare&gt;.html") && !page.contains("<compare>"));
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!outside.contains("http") && !outside.contains("url(") && !outside.contains("<script"));
}

#[test]
fn json_has_the_promised_keys_and_files_are_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let inputs = [path("a.json"), path("b.json")];
    for (input, boot) in inputs.iter().zip(boots()) {
        fs::write(input, serde_json::to_string(&boot).unwrap()).unwrap();
    }
    let (json, html) = (path("compare.json"), path("compare.html"));
    fs::write(&json, "old").unwrap();
    report(&[&inputs[0], &inputs[1], "--json", &json, "--html", &html]).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
    let value: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(value["environment"].as_array().unwrap().len(), 2);
    assert_eq!(value["raw"].as_array().unwrap().len(), 2);
    assert!(value["counted"].is_array() && value["disturbances"].is_array());
    let value = &value["timed"];
    for key in ["rows", "pairs", "maps", "self_checks"] {
        assert!(!value[key].as_array().unwrap().is_empty(), "{key}");
    }
    for row in value["rows"].as_array().unwrap() {
        for key in ["p50", "p99", "p999", "max"] {
            assert!(row["latency_ns"][key].as_u64().unwrap() > 0);
        }
        assert!(["forward_pps", "attach_ms", "first_packet_ms"].iter().all(|key| row[key].is_f64()));
        let count = |key: &str| row[key].as_u64().unwrap();
        assert!(count("received") > 0 && count("sent") == count("received") + count("dropped"));
    }
}

#[test]
fn the_schema_has_what_a_report_has() {
    let report = serde_json::to_value(as_report(boots())).unwrap();
    let schema = serde_json::to_value(schemars::schema_for!(Report)).unwrap();
    let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&schema["properties"]), keys(&report));
    assert_eq!(keys(&schema["$defs"]["Comparison"]["properties"]), keys(&report["timed"]));
}

#[test]
fn a_bad_recording_is_named_with_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("bad.json");
    let said = |text: &str| {
        fs::write(&input, text).unwrap();
        report(&[input.to_str().unwrap()]).unwrap_err().to_string()
    };
    let error = said("{\"environment\": {},\n \"runs\": 7}");
    assert!(error.contains("bad.json: ") && error.ends_with("at line 2 column 10"), "{error}");
    assert!(said("").contains("EOF") && !said("[").contains('\n'));
    assert!(said("{\"environment\": {}, \"runs\": []}").starts_with("nothing to report"));
    fs::remove_file(&input).unwrap();
    assert!(report(&[input.to_str().unwrap()]).unwrap_err().to_string().contains("ENOENT"));
}

#[test]
fn recordings_of_two_machines_are_refused_together() {
    let dir = tempfile::tempdir().unwrap();
    let mut paths = Vec::new();
    for (name, mut boot) in ["a.json", "b.json"].into_iter().zip(boots()) {
        for (key, value) in &mut boot.environment.0 {
            if name == "b.json" && key == "cpu" {
                *value = "another".to_owned();
            }
        }
        let path = dir.path().join(name);
        fs::write(&path, serde_json::to_string(&boot).unwrap()).unwrap();
        paths.push(path.to_str().unwrap().to_owned());
    }
    let error = report(&[&paths[0], &paths[1]]).unwrap_err();
    assert_eq!(error.kind(), vireo_eal::ErrorKind::Usage);
    let text = error.to_string();
    assert!(
        text.contains("b.json together: they are from different machines: cpu AMD EPYC 7B13 and another"),
        "{text}"
    );
}

/// Vireo before 0.2 wrote one object. In each round it ran one mode against itself, then modes in a fixed
/// order, each twice.
#[test]
fn an_older_recording_is_read_and_claims_nothing() {
    let run = |mode: &str, pair: &str, round: u32| {
        serde_json::json!({
            "nic": "e1000", "mode": mode, "round": round, "pair": pair, "forward_pps": 1e5,
            "latency_ns": {"p50": 4000, "p99": 9000, "p999": 20_000, "max": 50_000, "count": 1000},
            "open_ms": 1.0, "bind_ms": 1.0, "attach_ms": 1.0, "first_packet_ms": 9.0,
            "map_ms": 8.0, "map_bytes": 1 << 27, "map_ioctls": 1, "unmap_ms": 4.0,
            "sent": 1000, "received": 1000, "drops": {}
        })
    };
    let rounds = (0..6).flat_map(|round| {
        let order = ["container", "cdev", "cdev", "container"].map(|mode| run(mode, "modes", round));
        [run("container", "A/A", round), run("container", "A/A", round)].into_iter().chain(order)
    });
    let old = serde_json::json!({ "environment": { "cpu": "AMD" }, "runs": rounds.collect::<Vec<_>>() });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.json");
    fs::write(&path, old.to_string()).unwrap();
    let recording = crate::record::read(&path, false).unwrap();
    let comparison = compare(&[recording]);
    assert_eq!((comparison.rows.len(), comparison.rows[0].latency_ns.p99), (2, 9000));
    let p = pair(&comparison, "e1000", ["container", "cdev"], Metric::ForwardPps);
    assert_eq!((p.rounds, p.verdict), (6, Verdict::TooFewRounds));
    assert!(p.sentence.ends_with("is not judged: 6 rounds, but 4 comparisons need 8"), "{}", p.sentence);
    assert_eq!(comparison.self_checks[0].rounds, 6);
}

#[test]
fn the_environment_keeps_its_order() {
    let text = r#"{"zeta":"1","alpha":"2"}"#;
    let environment: Environment = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&environment).unwrap(), text);
}

fn report(words: &[&str]) -> vireo_eal::Result<()> {
    let command = ReportArgs::augment_args(clap::Command::new("report").no_binary_name(true));
    let args = ReportArgs::from_arg_matches(&command.get_matches_from(words)).unwrap();
    report_to(&args, &mut Vec::new(), false)
}
