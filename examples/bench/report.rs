//! The table and the plot.

use std::path::Path;

use plotters::prelude::*;

use crate::load::{Outcome, SLICE};

/// The size of the plot, in pixels.
const SIZE: (u32, u32) = (900, 700);
/// The plotted percentiles: 100 means the slowest of 100 requests, the 99th percentile.
const SLOWEST_OF: [f64; 9] = [1.0, 2.0, 4.0, 10.0, 20.0, 100.0, 1_000.0, 10_000.0, 100_000.0];

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Prints a line per target: the medians of its rounds, and the ratio of its throughput to the first
/// target's. A gap is the longest time without a successful request.
pub fn print(targets: &[(&str, &[Outcome])]) {
    println!(
        "{:<16}{:>12}{:>9}{:>10}{:>10}{:>10}{:>10}{:>8}{:>9}",
        "", "requests/s", "beside", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "gap ms", "errors"
    );
    let of = |outcomes: &[Outcome], figure: &dyn Fn(&Outcome) -> f64| {
        median(outcomes.iter().map(figure).collect())
    };
    let first =
        targets.first().map_or(f64::NAN, |(_, outcomes)| of(outcomes, &Outcome::throughput));
    for (name, outcomes) in targets {
        let throughput = of(outcomes, &Outcome::throughput);
        let errors: u64 = outcomes.iter().flat_map(|outcome| outcome.errors.values()).sum();
        println!(
            "{name:<16}{throughput:>12.0}{:>9}{:>10.2}{:>10.2}{:>10.2}{:>10.1}{:>8.0}{errors:>9}",
            if first > 0.0 { format!("{:.2}", throughput / first) } else { "-".to_owned() },
            of(outcomes, &|outcome| outcome.percentile(50.0)),
            of(outcomes, &|outcome| outcome.percentile(99.0)),
            of(outcomes, &|outcome| outcome.percentile(99.9)),
            of(outcomes, &|outcome| outcome.percentile(100.0)),
            of(outcomes, &Outcome::longest_gap),
        );
    }
    for (name, outcomes) in targets {
        for (round, outcome) in outcomes.iter().enumerate() {
            for (error, count) in &outcome.errors {
                println!("{name}, round {}: {count} × {error}", round + 1);
            }
        }
    }
}

/// Draws the median throughput in each slice of time, and the median of each latency percentile.
pub fn plot(targets: &[(&str, &[Outcome])], path: &Path) -> anyhow::Result<()> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(SIZE.1 as i32 / 2);
    let seconds = SLICE.as_secs_f64();
    let throughputs: Vec<Vec<(f64, f64)>> = targets
        .iter()
        .map(|(_, outcomes)| {
            let slices = outcomes.iter().map(|outcome| outcome.slices.len()).min().unwrap_or(0);
            let rate = |slice: usize| {
                let counts = outcomes.iter().map(|outcome| outcome.slices[slice] as f64);
                median(counts.collect()) / seconds
            };
            (0..slices).map(|slice| (slice as f64 * seconds, rate(slice))).collect()
        })
        .collect();
    let latencies: Vec<Vec<(f64, f64)>> = targets
        .iter()
        .map(|(_, outcomes)| {
            let latency = |slowest_of: f64| {
                let percent = 100.0 - 100.0 / slowest_of;
                median(outcomes.iter().map(|outcome| outcome.percentile(percent)).collect())
            };
            SLOWEST_OF.iter().map(|&of| (of, latency(of).max(0.001))).collect()
        })
        .collect();
    let end = |lines: &[Vec<(f64, f64)>], axis: fn(&(f64, f64)) -> f64| {
        lines.iter().flatten().map(axis).fold(f64::MIN_POSITIVE, f64::max)
    };

    let mut chart = ChartBuilder::on(&upper)
        .caption("requests per second", ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(35)
        .y_label_area_size(70)
        .build_cartesian_2d(
            0.0..end(&throughputs, |point| point.0),
            0.0..end(&throughputs, |point| point.1) * 1.05,
        )?;
    chart.configure_mesh().x_desc("seconds").draw()?;
    draw_lines(&mut chart, targets, &throughputs)?;

    let lowest = latencies.iter().flatten().map(|point| point.1).fold(f64::MAX, f64::min);
    let mut chart = ChartBuilder::on(&lower)
        .caption("latency, ms", ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(35)
        .y_label_area_size(70)
        .build_cartesian_2d(
            (1.0..100_000.0).log_scale(),
            (lowest..end(&latencies, |point| point.1) * 1.2).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("slowest of N requests (2 is the median, 100 the 99th percentile)")
        .draw()?;
    draw_lines(&mut chart, targets, &latencies)?;
    root.present()?;
    Ok(())
}

fn draw_lines<'a, X, Y>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
    targets: &[(&str, &[Outcome])],
    lines: &[Vec<(f64, f64)>],
) -> anyhow::Result<()>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    for (number, (line, (name, _))) in lines.iter().zip(targets).enumerate() {
        let color = Palette99::pick(number).to_rgba();
        chart
            .draw_series(LineSeries::new(line.iter().copied(), color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
    Ok(())
}
