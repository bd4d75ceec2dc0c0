package cascade.peers;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.microsoft.ml.lightgbm.PredictionType;
import io.github.metarank.lightgbm4j.LGBMBooster;
import io.github.metarank.lightgbm4j.LGBMException;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.Map;
import java.util.stream.Stream;

/** The screener in this process, the deep model on Triton, and the policy that decides by them. */
final class Models {
    private static final String[] WINDOWS = {"1d", "7d", "30d"};
    /** Log-odds by which an escalation raises the threshold, as in the peers in Python. */
    private static final double THRESHOLD_STEP = 0.1;

    private final Map<String, Integer> columns = new HashMap<>();
    private final LGBMBooster screener;
    private final Triton triton;
    private final JsonNode policy;
    private final String version;
    private final double reviewFrom;
    private final double declineFrom;
    /** The features of the current transaction; those that no code sets stay 0. */
    final double[] row;
    private final double share;
    private final boolean moves;
    private double threshold;

    Models(Options options) {
        Path bundle = Path.of(options.text("bundle"));
        try {
            ObjectMapper json = new ObjectMapper();
            policy = json.readTree(Files.readString(bundle.resolve("policy.json")));
            version = json.readTree(Files.readString(bundle.resolve("manifest.json"))).get("version").asText();
            screener = LGBMBooster.loadModelFromString(Files.readString(bundle.resolve("screener.txt")));
            String[] names = screener.getFeatureNames();
            for (int column = 0; column < names.length; column++) {
                columns.put(names[column], column);
            }
            row = new double[names.length];
            triton = new Triton(
                options.text("triton-http"), json.readTree(Files.readString(bundle.resolve("deep.json"))), row.length);
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        } catch (LGBMException error) {
            throw new IllegalStateException("screener.txt: " + error.getMessage(), error);
        }
        reviewFrom = policy.get("review_from").asDouble();
        declineFrom = policy.get("decline_from").asDouble();
        moves = !options.has("escalate-above");
        share = options.number("escalate-share", 0.01);
        threshold = options.number("escalate-above", rawAt(reviewFrom));
    }

    /** The index of a feature in `row`. */
    int column(String feature) {
        return columns.get(feature);
    }

    /** The indexes of a feature over each of its windows. */
    int[] columns(String stem) {
        return Stream.of(WINDOWS).mapToInt(window -> column(stem + window)).toArray();
    }

    Decision decide(Decider.Transaction transaction, CardState card, String id, long appendedMs) throws IOException {
        double raw = screen();
        double screened = probability(raw);
        double score = screened;
        double deepMs = 0.0;
        boolean escalate = escalate(raw);
        if (escalate) {
            long started = System.nanoTime();
            score = combined(raw, triton.ask(card, row, raw));
            deepMs = (System.nanoTime() - started) / 1e6;
        }
        String decision = score >= declineFrom ? "decline" : score >= reviewFrom ? "review" : "approve";
        long nowMs = System.currentTimeMillis();
        Map<String, Double> latencyMs = Map.of(
            "queue", 0.0, "features", 0.0, "screener", 0.0, "deep", deepMs, "total", (double) (nowMs - appendedMs));
        return new Decision(
            transaction.transactionId(), decision, score, escalate ? "deep" : "screener", screened, version, false, null, id,
            false, null, transaction.eventTime(), nowMs, latencyMs);
    }

    private double screen() {
        try {
            return screener.predictForMatSingleRow(row, PredictionType.C_API_PREDICT_RAW_SCORE);
        } catch (LGBMException error) {
            throw new IllegalStateException(error.getMessage(), error);
        }
    }

    private boolean escalate(double raw) {
        boolean escalate = raw >= threshold;
        if (moves) {
            threshold += THRESHOLD_STEP * ((escalate ? 1 : 0) - share);
        }
        return escalate;
    }

    private double probability(double raw) {
        return logistic(number("screener", "slope") * raw + number("screener", "intercept"));
    }

    /** The screener's raw score whose probability is `chance`. */
    private double rawAt(double chance) {
        return (Math.log(chance / (1.0 - chance)) - number("screener", "intercept")) / number("screener", "slope");
    }

    private double combined(double screenerRaw, double deepRaw) {
        return logistic(number("combined", "screener") * screenerRaw + number("combined", "deep") * deepRaw
            + number("combined", "intercept"));
    }

    private double number(String part, String key) {
        return policy.get(part).get(key).asDouble();
    }

    private static double logistic(double logOdds) {
        return 1.0 / (1.0 + Math.exp(-logOdds));
    }

    void close() {
        try {
            screener.close();
        } catch (LGBMException error) {
            throw new IllegalStateException(error.getMessage(), error);
        }
    }
}
