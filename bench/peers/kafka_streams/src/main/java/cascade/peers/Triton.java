package cascade.peers;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** The deep model over Triton's HTTP interface (KServe's inference protocol, version 2). */
final class Triton {
    private static final ObjectMapper JSON = new ObjectMapper();
    private static final String SEQUENCE_INPUT = "card_sequence";
    private final HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    private final URI model;
    private final JsonNode signature;
    private final int features;

    Triton(String base, JsonNode signature, int features) {
        model = URI.create(base + "/v2/models/fraud_deep/infer");
        this.signature = signature;
        this.features = features;
    }

    /** The log-odds of the deep model; blocks until they arrive. */
    double ask(CardState card, double[] row, double raw) throws IOException {
        ObjectNode request = JSON.createObjectNode();
        ArrayNode inputs = request.putArray("inputs");
        signature.get("sequences").fields().forEachRemaining(sequence -> {
            int length = sequence.getValue().get(0).asInt();
            int width = sequence.getValue().get(1).asInt();
            ArrayNode data = input(inputs, sequence.getKey(), 1, length, width);
            int known = sequence.getKey().equals(SEQUENCE_INPUT) ? card.steps : 0;
            // zeros for what a peer does not know: other sequences, and the terminal's part of a step
            for (int filler = 0; filler < (length - known) * width; filler++) {
                data.add(0);
            }
            if (known > 0) {
                steps(data, card, width);
            }
        });
        ArrayNode current = input(inputs, signature.get("features_input").asText(), 1, features + 1);
        for (double value : row) {
            current.add(value);
        }
        current.add(raw);
        return JSON.readTree(post(JSON.writeValueAsBytes(request))).at("/outputs/0/data/0").asDouble();
    }

    private static void steps(ArrayNode sequence, CardState card, int width) {
        long nowMs = card.times[card.steps - 1];
        for (int step = 0; step < card.steps; step++) {
            long timeMs = card.times[step];
            sequence.add(1).add((nowMs - timeMs) / 1e3).add(card.amounts[step]);
            sequence.add(timeMs % DayTotals.DAY_MS / 3_600_000.0).add(card.ratios[step]);
            for (int unknown = 5; unknown < width; unknown++) {
                sequence.add(0);
            }
        }
    }

    private ArrayNode input(ArrayNode inputs, String name, int... shape) {
        ObjectNode tensor = inputs.addObject().put("name", name).put("datatype", "FP32");
        ArrayNode sizes = tensor.putArray("shape");
        for (int size : shape) {
            sizes.add(size);
        }
        return tensor.putArray("data");
    }

    private byte[] post(byte[] body) throws IOException {
        HttpRequest request = HttpRequest.newBuilder(model).POST(HttpRequest.BodyPublishers.ofByteArray(body)).build();
        try {
            HttpResponse<byte[]> answer = client.send(request, HttpResponse.BodyHandlers.ofByteArray());
            if (answer.statusCode() != 200) {
                throw new IOException("Triton: " + answer.statusCode() + " " + new String(answer.body()));
            }
            return answer.body();
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
            throw new IOException("interrupted", error);
        }
    }
}
